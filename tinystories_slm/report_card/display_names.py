"""Names of models on pages and in votes."""

from collections.abc import Sequence
from pathlib import Path

from tinystories_slm.errors import UserError


def display_names(models: Sequence[str], *, option: str) -> list[str]:
    """Return a name for each model, without a path of this machine: the page may be shared.

    Raises:
        UserError: a model is given twice; the message names `option`.
    """
    if len(set(models)) < len(models):
        raise UserError(f"{option} ({models[-1]}): must differ from the other models; remove it")
    names = []
    for model in models:
        path = Path(model)
        name = "/".join(path.resolve().parts[-2:]) if path.exists() else model
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names

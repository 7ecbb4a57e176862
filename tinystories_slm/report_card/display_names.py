"""Names of models on pages and in votes."""

from collections.abc import Sequence
from pathlib import Path

from tinystories_slm.errors import UserError
from tinystories_slm.model_folder import resolve_model


def display_names(models: Sequence[str], *, option: str) -> list[str]:
    """Return a name for each model, without a path of this machine: the page may be shared.

    Raises:
        UserError: a model is given twice; the message names `option`.
    """
    if len(set(models)) < len(models):
        raise UserError(f"{option} ({models[-1]}): must differ from the other models; remove it")
    names = []
    for model in models:
        name = _display_name(model)
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _display_name(model: str) -> str:
    if Path(model).exists():
        return "/".join(Path(model).resolve().parts[-2:])
    if Path(resolve_model(model).name).exists():  # RUN@step512
        run, _, revision = model.rpartition("@")
        return f"{Path(run).resolve().name}@{revision}"
    return model

"""Paths of resource files: presets and the model card template."""

from pathlib import Path

from tinystories_slm.errors import UserError

_PACKAGE = Path(__file__).parent


def resource_path(name: str) -> Path:
    """Return the path of `model_card.md` or `configs/...`: in the installed wheel, else in the checkout.

    A wheel holds these files inside the package, a checkout at its root.

    Raises:
        UserError: the file exists in neither place.
    """
    candidates = (_PACKAGE / "resources" / name, _PACKAGE.parent / name)
    for path in candidates:
        if path.exists():
            return path
    raise UserError(
        f"{name} is missing from this installation ({candidates[0]} does not exist); reinstall it"
    )

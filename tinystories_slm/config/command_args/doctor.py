"""Options of the doctor command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.config.sections import expand_home


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(RunConfig):
    """Check a configuration on this machine, without training, downloading or writing anything.

    With `--model M` (a folder or Hub id) and no configuration, check that model instead. The exit code is 0
    without problems, 1 with problems, and 2 for an invalid configuration.
    """

    output: Path | None = None
    """JSON file for the results of the checks; null for none."""


@dataclass(frozen=True, kw_only=True)
class ModelDoctorArgs:
    """Check a model with the installed packages, without writing anything.

    The exit code is 0 without problems, 1 with problems, and 2 for a model that cannot be loaded.
    """

    model: str
    """Model folder (RUN/best, an export) or Hub id of any causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model, or a kept step of a run directory (`step512`)."""
    trust_remote_code: bool = False
    """Run the model's own code; not needed for models trained here."""
    output: Path | None = None
    """JSON file for the results of the checks; null for none."""

    def __post_init__(self) -> None:
        expand_home(self)


def doctor_args(argv: Sequence[str]) -> type[DoctorArgs] | type[ModelDoctorArgs]:
    """Return the class of the options in `argv`: `--model M` names a model, `--model.lr` belongs to a run."""
    names_model = any(arg == "--model" or arg.startswith("--model=") for arg in argv)
    return ModelDoctorArgs if names_model else DoctorArgs

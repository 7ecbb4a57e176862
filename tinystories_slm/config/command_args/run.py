"""Options of the commands that train, beside those of a run."""

from dataclasses import dataclass
from pathlib import Path

from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StoryArgs(RunConfig):
    """Train, evaluate and generate in one go; a finished run generates another story."""

    minutes: float | None = None
    """Minutes of the whole command; every option that is not given is chosen for them (docs/planning.md).
    null for the preset."""
    law: Path | None = None
    """File of laws that plans the minutes, as scripts/scaling.py writes it; null for that of the package."""
    more: float | None = None
    """Minutes to train a finished run on (docs/longer.md); null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_minutes(minutes=self.minutes, more=self.more)
        _check_law(self.law, self.minutes)


@dataclass(frozen=True, kw_only=True)
class TrainCommandArgs(RunConfig):
    """Train a model, or resume its run."""

    minutes: float | None = None
    """Minutes of the whole command; every option that is not given is chosen for them (docs/planning.md).
    null for the options as they are."""
    law: Path | None = None
    """File of laws that plans the minutes, as scripts/scaling.py writes it; null for that of the package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_minutes(minutes=self.minutes)
        _check_law(self.law, self.minutes)


def _check_law(law: Path | None, minutes: float | None) -> None:
    if law is not None and minutes is None:
        raise UserError(f"law ({law}): has no effect without minutes; set --minutes 10")


def _check_minutes(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} ({value}): must be a number of minutes above 0; try 10")

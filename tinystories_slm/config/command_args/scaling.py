"""Options of the scaling command."""

from dataclasses import dataclass, field
from pathlib import Path

from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import expand_user


@dataclass(frozen=True, kw_only=True)
class ScalingArgs:
    """Fit the law of the loss to the runs of sweeps, check it on held-out runs, and write it for `--law`."""

    sweep: Path | None = None
    """Sweep file to run first (configs/sweeps/scaling.yaml); only what is missing is trained. Its runs are
    fitted."""
    runs: list[str] | str = field(default_factory=list)
    """Folders of finished sweeps, or files like their sweep.json; more runs if `sweep` is set."""
    output: Path = Path("runs/scaling/law.json")
    """File of laws to write; laws of other data in it stay."""
    plot: Path | None = None
    """PNG picture to write; null for the name of `output` with the ending .png."""
    held_out_factor: float = 3.0
    """Check: predict the largest runs from the others, whose largest budget (parameters times tokens) is at
    least that of all runs divided by this."""

    def __post_init__(self) -> None:
        expand_home(self)
        if not 1 < self.held_out_factor < float("inf"):
            raise UserError(f"held_out_factor ({self.held_out_factor}): must be above 1; try 3")
        if self.sweep is None and not self.runs:
            raise UserError("runs ([]): must name the folder of a sweep; set it, or --sweep FILE to run one")

    @property
    def run_paths(self) -> list[Path]:
        """Folders and files in order."""
        return [expand_user(path) for path in ([self.runs] if isinstance(self.runs, str) else self.runs)]

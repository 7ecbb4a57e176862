"""Options of the doctor command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinystories_slm.config.run_config import RunConfig
from tinystories_slm.config.sections import expand_home
from tinystories_slm.errors import UserError


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


@dataclass(frozen=True, kw_only=True)
class ScaleDoctorArgs(RunConfig):
    """Estimate a training step on many GPUs, without starting a process (docs/communication.md).

    The defaults are those of machines with eight H100 GPUs, at half of their published FLOP/s.
    """

    world_size: int = 8
    """Number of processes, one for each GPU."""
    num_machines: int | None = None
    """Number of machines; null for eight processes on each."""
    link_gbps: float = 3200.0
    """Gbit/s of the network of a machine, in one direction; eight cards of 400 have 3200."""
    gpu_link_gbps: float = 3600.0
    """Gbit/s between the GPUs of a machine, in one direction."""
    hop_us: float = 5.0
    """Microseconds of a message between two processes."""
    gpu_tflops: float = 989.4
    """Published TFLOP/s of a GPU in the precision of the run."""
    mfu: float = 0.5
    """Share of them that a step without communication reaches; small models reach less (docs/speed.md)."""
    output: Path | None = None
    """JSON file for the results; null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name} ({value}) must be at least 1"
            for name in ("world_size", "num_machines")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name} ({getattr(self, name)}) must be above 0"
            for name in ("link_gbps", "gpu_link_gbps", "gpu_tflops", "mfu")
            if not 0 < getattr(self, name) < math.inf
        ]
        if not 0 <= self.hop_us < math.inf:
            problems.append(f"hop_us ({self.hop_us}) must be at least 0")
        if self.num_machines is not None and self.num_machines >= 1 and self.world_size % self.num_machines:
            problems.append(
                f"world_size ({self.world_size}) must be a multiple of num_machines ({self.num_machines})"
            )
        if problems:
            raise UserError("; ".join(problems))

    @property
    def num_hosts(self) -> int:
        """Number of machines."""
        return self.num_machines or math.ceil(self.world_size / 8)


def doctor_args(argv: Sequence[str]) -> type[DoctorArgs] | type[ModelDoctorArgs] | type[ScaleDoctorArgs]:
    """Return the class of the options in `argv`.

    `--model M` names a model, `--model.lr` belongs to a run; `--world_size N` estimates a run.
    """
    names = {arg.partition("=")[0] for arg in argv}
    if "--model" in names:
        return ModelDoctorArgs
    return ScaleDoctorArgs if "--world_size" in names else DoctorArgs

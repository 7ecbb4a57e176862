"""environment.json: the hardware, runtime settings and package versions of a run."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import describe_hardware, package_versions
from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.io.atomic import write_text
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.runtime import RuntimeSettings

# Each session measures them again.
_MEASURED = ("peak_flops_per_second", "peak_source")


def write_environment(
    run_dir: Path, accelerator: Accelerator, runtime: RuntimeSettings, peak: PeakFlops, *, first_step: int = 1
) -> Path:
    """Write environment.json; every session does, because a run may resume on another machine.

    `first_step` is the first step of this session. A session with another environment moves the previous one
    to `earlier_sessions`; its steps end where the next one's begin. The file names hardware and packages, but
    not the host, the user or any path.
    """
    environment = {
        "first_step": first_step,
        "hardware": describe_hardware(accelerator.device),
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "compile": runtime.compiled,
        "fused_kernels": runtime.fused,
        "attention": runtime.attention,
        "per_device_batch_size": runtime.per_device_batch_size,
        "num_threads": runtime.num_threads,
        "allocator": runtime.allocator,
        "packages": package_versions(),
        "peak_flops_per_second": peak.flops_per_second,
        "peak_source": peak.method,
    }
    environment |= _session_history(RunDir(run_dir), environment)
    path = RunDir(run_dir).environment
    write_text(path, json.dumps(environment, indent=2) + "\n")
    return path


def _session_history(run_dir: RunDir, environment: dict[str, Any]) -> dict[str, Any]:
    """Return `first_step` and, if there were other environments, `earlier_sessions` of `environment`."""
    first_step = environment["first_step"]
    try:
        previous = run_dir.read_environment()
        sessions = [*previous.pop("earlier_sessions", []), previous] if previous else []
        # A run that went back to an earlier checkpoint repeats the later steps.
        sessions = [session for session in sessions if session.get("first_step", 1) < first_step]
    except (UserError, AttributeError, TypeError):  # damaged: it is replaced
        sessions = []
    if sessions and _identity(sessions[-1]) == _identity(environment):
        first_step = sessions.pop().get("first_step", 1)
    return {"first_step": first_step} | ({"earlier_sessions": sessions} if sessions else {})


def _identity(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name not in (*_MEASURED, "first_step")}

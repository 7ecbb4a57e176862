"""environment.json: the hardware, runtime settings and package versions of a run."""

import json
from pathlib import Path

from accelerate import Accelerator

from tinystories_slm.hardware.host import describe_hardware, package_versions
from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.io.atomic import write_text
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.runtime import RuntimeSettings


def write_environment(
    run_dir: Path, accelerator: Accelerator, runtime: RuntimeSettings, peak: PeakFlops
) -> Path:
    """Write environment.json; every session does, because a run may resume on another machine.

    The file names hardware and packages, but not the host, the user or any path.
    """
    environment = {
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
    path = RunDir(run_dir).environment
    write_text(path, json.dumps(environment, indent=2) + "\n")
    return path

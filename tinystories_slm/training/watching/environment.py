"""What a run is computed on and with, for people who compare runs: environment.json."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from tinystories_slm.training.settings import Settings
from tinystories_slm.training.watching.estimate import Peak

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "tinystories_slm")


def write_environment(run_dir: Path, accelerator: Accelerator, settings: Settings, peak: Peak) -> Path:
    """Write `environment.json`, anew at each start, as a run may go on elsewhere.

    It names hardware and packages and neither the host, nor the user, nor a path.
    """
    environment = {
        "hardware": hardware(accelerator.device),
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "compile": settings.compiled,
        "fused_kernels": settings.fused,
        "attention": settings.attention,
        "per_device_batch_size": settings.per_device_batch_size,
        "num_threads": settings.num_threads,
        "allocator": settings.allocator,
        "packages": packages(),
        "peak_flops_per_second": peak.flops_per_second,
        "peak_source": peak.source,
    }
    path = run_dir / "environment.json"
    path.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    return path


def hardware(device: torch.device) -> str:
    """Such as `AMD EPYC, 2 cores, 24 GB`, after the GPU's name and memory where there is one."""
    memory = round(psutil.virtual_memory().total / 2**30)
    parts = [_processor(), f"{_num_cores()} cores", f"{memory} GB"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts = [properties.name, f"{round(properties.total_memory / 2**30)} GB", *parts]
    return ", ".join(parts)


def packages() -> dict[str, str]:
    """Versions of Python and of what computes."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions


def _num_cores() -> int:
    """Those this process may use: in a container or a batch job, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    if match := re.search(r"^model name\s*:\s*(\S.*)$", text, flags=re.MULTILINE):
        return " ".join(match[1].split())
    return platform.processor() or platform.machine()

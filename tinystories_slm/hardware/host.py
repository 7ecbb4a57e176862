"""Description of this machine: processor, cores, memory and installed packages."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "tinystories_slm")


def describe_hardware(device: torch.device) -> str:
    """Return a line such as `AMD EPYC, 2 cores, 24 GB`, with the GPU's name and memory first on CUDA."""
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    parts = [processor_name(), f"{num_usable_cores()} cores", f"{memory_gib} GB"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts = [properties.name, f"{round(properties.total_memory / 2**30)} GB", *parts]
    return ", ".join(parts)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages; `unknown` if a package is not installed."""
    versions = {name: installed_version(name) or "unknown" for name in _PACKAGES}
    return {"python": platform.python_version(), **versions}


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def num_usable_cores() -> int:
    """Number of logical cores that this process may use; a container or a batch job may limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_physical_cores() -> int:
    """Number of physical cores that this process may use, without hyper-threads."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, min(physical, num_usable_cores()))


def processor_name() -> str:
    """Return the model name of the processor, from sysctl on macOS and /proc/cpuinfo on Linux."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if name:
            return name
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    if match := re.search(r"^model name\s*:\s*(\S.*)$", text, flags=re.MULTILINE):
        return " ".join(match[1].split())
    return platform.processor() or platform.machine()

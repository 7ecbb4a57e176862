"""Description of this machine: processor, cores, memory and installed packages."""

import ctypes
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

# Lines of /proc/cpuinfo that name a processor and its instructions: x86, ARM, RISC-V, POWER.
_CPU_FIELDS = re.compile(
    r"^(?:model name|flags|CPU (?:implementer|architecture|variant|part)|Features|isa|uarch|cpu)\s*:.*$",
    flags=re.MULTILINE,
)

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
        for line in _sysctl("machdep.cpu.brand_string"):
            return line.partition(": ")[2]
    text = _read_text(Path("/proc/cpuinfo"))
    if match := re.search(r"^model name\s*:\s*(\S.*)$", text, flags=re.MULTILINE):
        return " ".join(match[1].split())
    return platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Return the model and instruction set of the processor: what `-march=native` depends on.

    Where the system does not name them, the name of the machine stands for them.
    """
    if platform.system() == "Darwin":
        found = set(_sysctl("machdep.cpu", "hw.optional"))
    else:
        found = set(_CPU_FIELDS.findall(_read_text(Path("/proc/cpuinfo"))))
    return (platform.machine(), *(sorted(found) or [platform.node()]))


def loaded_libraries() -> list[str]:
    """Return the paths of the libraries that this process has loaded; empty where the system hides them."""
    if platform.system() == "Darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        return [os.fsdecode(dyld._dyld_get_image_name(i)) for i in range(dyld._dyld_image_count())]
    return sorted(set(re.findall(r"/.*\.so\b.*$", _read_text(Path("/proc/self/maps")), flags=re.MULTILINE)))


def _sysctl(*names: str) -> list[str]:
    """Return the lines that macOS's `sysctl` prints for `names`; names that it does not know are skipped."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", *names], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return done.stdout.rstrip("\n").split("\n") if done.stdout else []


def _read_text(path: Path) -> str:
    """Return the text of a file of /proc; empty without it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

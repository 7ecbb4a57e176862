"""The machine and what is installed on it."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from packaging.requirements import Requirement

from tinystories_slm.allocator import keep_freed_memory
from tinystories_slm.doctor.finding import Finding

_TOLD = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "huggingface_hub")
# Of the cores; what is below may be this checkup itself, or the command before it.
_BUSY = 0.75
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

ONE_HEAP = (
    "export GLIBC_TUNABLES="
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
)
"""Makes glibc keep what it was given, in huge pages, instead of giving large tensors back at each step."""


def training_device() -> torch.device:
    """Where one process of a training would run here."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def packages() -> Iterator[Finding]:
    """Installed versions against the ranges of setup.cfg."""
    try:
        declared = requires("tinystories_slm") or []
    except PackageNotFoundError:
        yield Finding(
            "packages", "PROBLEM", "tinystories_slm itself is not installed", "python -m pip install -e ."
        )
        return
    told = []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None:  # of an extra
            continue
        installed = installed_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            yield Finding(
                "packages",
                "PROBLEM",
                f"{requirement.name} is {installed or 'not installed'}, needed is {requirement.specifier}",
                f"python -m pip install '{requirement.name}{requirement.specifier}'",
            )
        elif requirement.name in _TOLD:
            told.append(f"{requirement.name} {installed}")
    yield Finding("packages", "ok", f"python {platform.python_version()}, {', '.join(told)}")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or null."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices(device: torch.device) -> Iterator[Finding]:
    """The processor, and every accelerator by name."""
    memory_gb = psutil.virtual_memory().total / 1e9
    yield Finding(
        "processor", "ok", f"{_processor_name()}, {physical_cores()} cores, {memory_gb:.0f} GB of memory"
    )
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "device",
                "ok",
                f"{device.type}:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB",
            )
    elif device.type != "cpu":
        yield Finding("device", "ok", f"{device.type}, {torch.accelerator.device_count()} of them")
    elif parse_flag_from_env("ACCELERATE_USE_CPU") and torch.accelerator.is_available():
        yield Finding(
            "device", "slow", "ACCELERATE_USE_CPU keeps training off the GPU here", "unset ACCELERATE_USE_CPU"
        )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "device",
            "PROBLEM",
            f"an NVIDIA driver is there, but torch {torch.__version__} sees no GPU, so the CPU would train",
            "install a torch for the CUDA that nvidia-smi names: https://pytorch.org/get-started/locally",
        )
    else:
        yield Finding("device", "ok", "cpu (no accelerator found)")


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, usable))


def threads(device: torch.device) -> Iterator[Finding]:
    """Torch's threads against the cores: too few leave cores idle, too many wait for each other."""
    cores, used = physical_cores(), torch.get_num_threads()
    setting = os.environ.get("OMP_NUM_THREADS")
    said = f"{used} threads on {cores} cores (OMP_NUM_THREADS is {setting or 'unset'})"
    if used == cores or device.type != "cpu":
        yield Finding("threads", "ok", said)
    else:
        yield Finding("threads", "slow", said, f"export OMP_NUM_THREADS={cores}")
    if device.type == "cpu" and "libiomp" in loaded_libraries() and "KMP_AFFINITY" not in os.environ:
        yield Finding(
            "threads",
            "slow",
            "Intel's OpenMP moves threads from core to core",
            "export KMP_AFFINITY=granularity=fine,compact,1,0 KMP_BLOCKTIME=1",
        )


def load() -> Iterator[Finding]:
    """Whether other programs keep the cores busy, which the speeds further down would suffer from."""
    cores, busy = physical_cores(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    said = f"{busy:.1f} programs running on {cores} cores in the last minute"
    if busy > _BUSY * cores:
        yield Finding("load", "slow", f"{said}: times below are too long", "end them, and ask again")
    else:
        yield Finding("load", "ok", said)


def allocator() -> Iterator[Finding]:
    """Which memory allocator the process runs on, and whether the kernel gives it huge pages."""
    libraries = loaded_libraries()
    other = next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in libraries), None)
    yield Finding("allocator", "ok", other or keep_freed_memory())
    if _HUGE_PAGES.exists() and "[never]" in _HUGE_PAGES.read_text(encoding="utf-8"):
        yield Finding(
            "huge pages",
            "slow",
            "switched off in the kernel, so memory comes 4 kB at a time",
            f"echo madvise | sudo tee {_HUGE_PAGES}",
        )


def loaded_libraries() -> str:
    """The memory map of this process, where every loaded library is named; empty where there is none."""
    maps = Path("/proc/self/maps")
    return maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()

"""Checks of the machine and of the installed packages."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from packaging.requirements import Requirement

from tinystories_slm.doctor.diagnostic import Diagnostic
from tinystories_slm.hardware.host import (
    installed_version,
    loaded_libraries,
    num_physical_cores,
    processor_name,
)
from tinystories_slm.hardware.malloc import describe_allocator

_REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "huggingface_hub")
# Share of the cores. A lower load may come from the doctor itself or from the command before it.
_MAX_LOAD = 0.75
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

MALLOC_TUNABLES = (
    "export GLIBC_TUNABLES="
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
)
"""Makes glibc keep freed memory, in huge pages, instead of returning large tensors at each step."""


def check_packages() -> Iterator[Diagnostic]:
    """Compare the installed versions with the ranges in setup.cfg."""
    try:
        declared = requires("tinystories_slm") or []
    except PackageNotFoundError:
        yield Diagnostic(
            "packages", "PROBLEM", "tinystories_slm itself is not installed", "python -m pip install -e ."
        )
        return
    versions = []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None:  # belongs to an extra
            continue
        installed = installed_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            yield Diagnostic(
                "packages",
                "PROBLEM",
                f"{requirement.name} is {installed or 'not installed'}, required: {requirement.specifier}",
                f"python -m pip install '{requirement.name}{requirement.specifier}'",
            )
        elif requirement.name in _REPORTED_PACKAGES:
            versions.append(f"{requirement.name} {installed}")
    yield Diagnostic("packages", "ok", f"python {platform.python_version()}, {', '.join(versions)}")


def check_device(device: torch.device) -> Iterator[Diagnostic]:
    """Name the processor and every accelerator."""
    memory_gb = psutil.virtual_memory().total / 1e9
    yield Diagnostic(
        "processor", "ok", f"{processor_name()}, {num_physical_cores()} cores, {memory_gb:.0f} GB of memory"
    )
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Diagnostic(
                "device",
                "ok",
                f"{device.type}:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB",
            )
    elif device.type != "cpu":
        yield Diagnostic("device", "ok", f"{device.type}, {torch.accelerator.device_count()} of them")
    elif parse_flag_from_env("ACCELERATE_USE_CPU") and torch.accelerator.is_available():
        yield Diagnostic(
            "device", "slow", "ACCELERATE_USE_CPU prevents training on the GPU", "unset ACCELERATE_USE_CPU"
        )
    elif shutil.which("nvidia-smi"):
        yield Diagnostic(
            "device",
            "PROBLEM",
            f"an NVIDIA driver is installed, but torch {torch.__version__} finds no GPU and uses the CPU",
            "install a torch build for the CUDA version that nvidia-smi shows: "
            "https://pytorch.org/get-started/locally",
        )
    else:
        yield Diagnostic("device", "ok", "cpu (no accelerator found)")


def check_threads(device: torch.device) -> Iterator[Diagnostic]:
    """Compare torch's threads with the cores: too few leave cores idle, too many wait for each other."""
    cores, num_threads = num_physical_cores(), torch.get_num_threads()
    setting = os.environ.get("OMP_NUM_THREADS")
    text = f"{num_threads} threads on {cores} cores (OMP_NUM_THREADS is {setting or 'unset'})"
    if num_threads == cores or device.type != "cpu":
        yield Diagnostic("threads", "ok", text)
    else:
        yield Diagnostic("threads", "slow", text, f"export OMP_NUM_THREADS={cores}")
    if device.type == "cpu" and "libiomp" in str(loaded_libraries()) and "KMP_AFFINITY" not in os.environ:
        yield Diagnostic(
            "threads",
            "slow",
            "Intel's OpenMP moves threads between cores",
            "export KMP_AFFINITY=granularity=fine,compact,1,0 KMP_BLOCKTIME=1",
        )


def check_load() -> Iterator[Diagnostic]:
    """Check whether other programs use the cores, which would slow down the timed checks."""
    cores, load = num_physical_cores(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text = f"{load:.1f} programs running on {cores} cores in the last minute"
    if load > _MAX_LOAD * cores:
        yield Diagnostic(
            "load", "slow", f"{text}: the times below are too long", "stop them and run the doctor again"
        )
    else:
        yield Diagnostic("load", "ok", text)


def check_allocator() -> Iterator[Diagnostic]:
    """Name the memory allocator of the process, and check whether the kernel gives it huge pages."""
    libraries = str(loaded_libraries())
    other = next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in libraries), None)
    yield Diagnostic("allocator", "ok", other or describe_allocator())
    if _HUGE_PAGES.exists() and "[never]" in _HUGE_PAGES.read_text(encoding="utf-8"):
        yield Diagnostic(
            "huge pages",
            "slow",
            "disabled in the kernel, so memory is mapped 4 kB at a time",
            f"echo madvise | sudo tee {_HUGE_PAGES}",
        )

import subprocess
import sys

import pytest

from tinystories_slm.hardware.malloc import tune_malloc

_PAGE_FAULTS_OF_TENTH_ALLOCATION = """
import resource, sys
sys.argv[0] = "tinystories-slm"  # as a command: the package does not import torch
from tinystories_slm.hardware.malloc import describe_allocator, tune_malloc
allocator = tune_malloc() if sys.argv[1] == "tune" else describe_allocator()
for _ in range(9):
    bytearray(40_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, allocator)
"""


def page_faults(mode: str) -> tuple[int, str]:
    """Return the page faults of the tenth allocation of 40 MB, and the description of the allocator."""
    done = subprocess.run(
        [sys.executable, "-c", _PAGE_FAULTS_OF_TENTH_ALLOCATION, mode],
        env={}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    number, allocator = done.stdout.strip().split(" ", 1)
    return int(number), allocator


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_tune_malloc_makes_glibc_reuse_freed_memory():
    faults, allocator = page_faults("tune")
    if allocator == "system default":
        pytest.skip("the C library is not glibc")
    assert allocator == "glibc (retains freed memory)"
    assert faults < 100  # of 9,766 pages
    faults, allocator = page_faults("leave")
    assert allocator == "glibc"
    assert faults > 5_000


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", "glibc (set by MALLOC_TRIM_THRESHOLD_)"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", "glibc (set by GLIBC_TUNABLES)"),
        ("LD_PRELOAD", "/opt/libtcmalloc.so.4", "preloaded /opt/libtcmalloc.so.4"),
    ],
)
def test_tune_malloc_respects_the_environment(monkeypatch, name, value, expected):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv(name, value)
    assert tune_malloc() == expected


def test_tune_malloc_changes_nothing_without_glibc(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert tune_malloc() == "system default"

import subprocess
import sys

import pytest

from tinystories_slm.allocator import keep_freed_memory

_FAULTS_OF_TENTH_TIME = """
import resource, sys
from tinystories_slm.allocator import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else "as it is"
for _ in range(9):
    bytearray(40_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, told)
"""


def faults(how: str, **environment: str) -> tuple[int, str]:
    """Page faults of the tenth allocation of 40 MB, and the allocator by its own account."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS_OF_TENTH_TIME, how],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    number, told = done.stdout.strip().split(" ", 1)
    return int(number), told


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_memory_that_was_freed_is_used_again():
    kept, told = faults("keep")
    if told == "the system's":
        pytest.skip("no glibc here")
    assert told == "glibc's, keeping what is freed"
    assert kept < 100  # of 9,766 pages
    assert faults("leave")[0] > 5_000


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", "glibc's, as MALLOC_TRIM_THRESHOLD_ says"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", "glibc's, as GLIBC_TUNABLES says"),
        ("LD_PRELOAD", "/opt/libtcmalloc.so.4", "preloaded /opt/libtcmalloc.so.4"),
    ],
)
def test_what_the_environment_says_about_memory_stands(monkeypatch, name, value, told):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() == told


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory() == "the system's"

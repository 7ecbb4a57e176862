"""What becomes of memory that is freed: the C library's allocator, told to keep it."""

import ctypes
import os
import platform

# mallopt(3): no block is a mapping of its own, and the top of the heap is never given back.
_M_TRIM_THRESHOLD, _NEVER = -1, -1
_M_MMAP_MAX, _NONE = -4, 0


def keep_freed_memory() -> str:
    """Let this process use freed memory again instead of returning it to the system.

    By default glibc maps each large tensor anew and returns it when it is freed, and the kernel has to
    clear every page of it at first touch: on a CPU that was up to 40 % of a training step. Nothing is
    changed where the environment sets glibc's allocator (`MALLOC_...`, `GLIBC_TUNABLES`) or replaces it
    (`LD_PRELOAD`), nor where there is no glibc.

    Returns:
        Which allocator is in force, for people.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        return f"preloaded {preloaded}"
    if platform.libc_ver()[0] != "glibc":
        return "the system's"
    tuned = [name for name in os.environ if name.startswith("MALLOC_")]
    tuned += ["GLIBC_TUNABLES"] if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") else []
    if tuned:
        return f"glibc's, as {tuned[0]} says"
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, _NONE)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return "glibc's, keeping what is freed"

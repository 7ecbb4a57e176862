"""Start a program that can read nothing but the system, this package and its own folder, without a network.

    python -I -S isolation.py WORK READABLE... -- PROGRAM ARGUMENTS

Landlock of Linux 5.13 and later does this without privileges
(https://docs.kernel.org/userspace-api/landlock.html); the limits hold for all processes that the program
starts. Connections by TCP are denied from Linux 6.7 on. A folder with the ending `/.` can be listed, and its
files cannot be read. This file imports the standard library alone, because it runs before each measured
process.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH, _NO_NEW_PRIVS = 1, 38
# Rights of files: execute, write, read, truncate (version 3); of folders: list, and ten to change them, of
# which the last one, to move files between folders, is of version 2.
_EXECUTE, _WRITE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_NUM_RIGHTS = {1: 13, 2: 14}
_OF_FILES = _EXECUTE | _WRITE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TCP = 0b11  # bind, connect

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys")
"""Readable."""
DEVICES = "/dev"
_KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Environment variables; others may name paths."""


def landlock_version() -> int:
    """Return the version of Landlock of this kernel; 0 without it."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def restrict(writable: Iterable[str], readable: Iterable[str]) -> None:
    """Deny this process and its children everything else.

    Raises:
        OSError: this kernel has no Landlock.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> int:
        result = libc.syscall(*arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
        return result

    version = landlock_version()
    every_right = (1 << _NUM_RIGHTS.get(version, 15)) - 1
    attributes = struct.pack("QQ", every_right, _TCP) if version >= 4 else struct.pack("Q", every_right)
    rules = call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    rights = [(path, every_right) for path in writable]
    rights += [(path, _READ_DIR if path.endswith("/.") else _READ) for path in readable]
    for path, allowed in rights:
        if not os.path.exists(path):
            continue
        allowed &= every_right if os.path.isdir(path) else every_right & _OF_FILES
        descriptor = os.open(path, os.O_PATH)
        call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", allowed, descriptor), ctypes.c_uint32(0))
        os.close(descriptor)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(_RESTRICT_SELF, rules, ctypes.c_uint32(0))
    os.close(rules)


def main(work: str, readable: Sequence[str], program: Sequence[str]) -> None:
    """Replace this process by `program`, in the folder `work`."""
    folders = {name: os.path.join(work, ".home", name) for name in ("home", "tmp", "hf")}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"HOME": folders["home"], "TMPDIR": folders["tmp"], "HF_HOME": folders["hf"]}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.chdir(work)
    restrict([work, DEVICES], [*SYSTEM, *readable])
    os.execvpe(program[0], program, environment)


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :])

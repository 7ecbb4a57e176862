"""Atomic writes: a file or directory is complete or absent, even if the program is killed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tinystories_slm.errors import UserError

_NOT_WRITABLE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def directory_lock(folder: Path) -> Iterator[None]:
    """Create `folder` if needed, and hold its lock; wait while another process holds it.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(
            f"data.data_dir ({folder}) cannot be written to ({error.strerror or error}); "
            "use another --data.data_dir, or free disk space"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, remove it on error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory; rename it to `path` on success, remove it on error.

    Raises:
        UserError: `path` exists. Callers check first that it is not a complete directory of this program.
    """
    if path.exists():
        raise UserError(
            f"{path} exists, but this program did not complete it; move it away, "
            "or use another --data.data_dir"
        )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _fsync(file)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as `sha256sum` prints it; reads the file in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, which may exist, and flush both to disk.

    A kill between the two renames leaves no `folder`; `recover_directory` then restores the old one.
    """
    apply_umask(new)
    fsync_directory(new)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    fsync_directory(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def apply_umask(folder: Path) -> None:
    """Set the mode of every file in `folder` to what the umask allows.

    safetensors writes files that only their owner can read: no web server, colleague or container could.
    """
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def recover_directory(folder: Path) -> None:
    """Restore `folder` after a kill between the two renames of `replace_directory`."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def fsync_directory(folder: Path) -> None:
    """Flush the files in `folder` and their directory entries to disk, to survive a power failure."""
    if os.name == "nt":
        return  # Windows cannot open a directory
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync(path: Path) -> None:
    # A rename may reach the disk before the data; a power failure would then leave an empty file.
    with path.open("rb+") as file:
        os.fsync(file.fileno())

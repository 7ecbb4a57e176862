"""Files and folders that are either finished or not there, whenever the program is killed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tinystories_slm.errors import InputError

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
def alone_in(folder: Path) -> Iterator[None]:
    """Make `folder`, and wait for any other process that is making something in it.

    The lock ends with its process, however that dies.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise InputError(
            f"data.data_dir ({folder}) cannot be written to ({error.strerror or error}); "
            "choose another --data.data_dir, or make room there"
        ) from error


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and goes when it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends well, and goes when it does not.

    Raises:
        InputError: `path` is there already; whoever asks has seen that it is not finished.
    """
    if path.exists():
        raise InputError(
            f"{path} is there but was not finished by this program; move it away, "
            "or choose another --data.data_dir"
        )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _to_disk(file)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces; what `sha256sum` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    # A rename may reach the disk before the bytes do; a power cut would then leave a finished, empty file.
    with path.open("rb+") as file:
        os.fsync(file.fileno())

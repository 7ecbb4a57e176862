"""Atomic writes: a file or directory is complete or absent, even if the program is killed."""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock

from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import translate_write_errors

logger = logging.getLogger(__name__)

# What a network or cloud drive returns for an operation that it does not have.
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_warned: set[str] = set()
"""Missing operations that were logged: one line each, not one for each file."""


@contextmanager
def directory_lock(folder: Path, *, option: str = "folder") -> Iterator[None]:
    """Create `folder`, the value of `option`, if needed, and hold its lock; wait while another process does.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    with translate_write_errors(option, folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        acquire_lock(lock)
        stack.callback(lock.release)
        yield


def acquire_lock(lock: BaseFileLock) -> None:
    """Acquire `lock`; on a file system without locks, log one line and go on without.

    Raises:
        filelock.Timeout: another process holds a lock that does not wait.
    """
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter from early versions of filelock
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        _warn_once(
            "flock",
            f"{Path(lock.lock_file).parent} is on a file system without locks ({error}): nothing keeps two "
            "processes from writing there; start only one",
        )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, remove it on error.

    A symbolic link stays, and its target is replaced. A device or a pipe (/dev/null) is written directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    if path.is_symlink():  # a loop of links; `resolve` would raise RuntimeError in some versions of Python
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        fsync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the UTF-8 file `path` atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str, *, option: str = "output") -> None:
    """Replace the UTF-8 file `path`, the value of `option`, atomically.

    Raises:
        UserError: it cannot be written, or the disk is full; an earlier file stays.
    """
    with translate_write_errors(option, path):
        write_text(path, text)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory; rename it to `path` on success, remove it on error.

    With `replace`, an existing directory is removed only then. A kill in between leaves no `path`.

    Raises:
        UserError: `path` exists, and `replace` is false. Callers check first that it is not a complete
            directory of this program.
    """
    if path.exists() and not replace:
        raise UserError(f"{path} exists, but this program did not complete it; move it away")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir()
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            fsync_file(file)
        if path.exists():
            remove_directory(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as `sha256sum` prints it; reads the file in chunks.

    Raises:
        UserError: `path` is a folder, a pipe, a device or a link to nothing.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a regular file; replace or delete it")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, which may exist, and flush both to disk.

    A kill between the two renames leaves no `folder`; `recover_directory` then restores the old one.
    """
    complete_directory(new)
    old = _replaced(folder)
    if folder.exists():
        remove_directory(old)
        folder.rename(old)
    new.rename(folder)
    fsync_directory(folder.parent)
    remove_directory(old)


def complete_directory(folder: Path) -> None:
    """Set the modes of all files in `folder` and its subfolders, and flush them to disk."""
    apply_umask(folder)
    for directory in (folder, *filter(Path.is_dir, folder.rglob("*"))):
        fsync_directory(directory)


def recover_directory(folder: Path) -> None:
    """Restore `folder` after a kill between the two renames of `replace_directory`."""
    for old in (_replaced(folder), folder.with_name(folder.name + ".old")):  # .old: earlier versions
        if old.exists() and not folder.exists():
            old.rename(folder)


def remove_directory(path: Path) -> None:
    """Remove a folder, or a symbolic link to one but not its contents."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def apply_umask(folder: Path) -> None:
    """Set the mode of every file in `folder` to what the umask allows.

    safetensors writes files that only their owner can read: no web server, colleague or container could. A
    file system without modes (FAT, some shares) keeps its own.
    """
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                path.chmod(0o666 & ~umask)
            except OSError as error:
                if error.errno not in (*_UNSUPPORTED, errno.EPERM):
                    raise


def fsync_file(path: Path) -> None:
    """Flush a file to disk.

    Otherwise a rename may reach the disk before the data, and a power failure leaves an empty file.
    """
    with path.open("rb+") as file, _unsupported_operation(path):
        os.fsync(file.fileno())


def fsync_directory(folder: Path) -> None:
    """Flush the files in `folder` and their directory entries to disk, to survive a power failure."""
    if os.name == "nt":
        return  # Windows cannot open a directory
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        with _unsupported_operation(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _unsupported_operation(path: Path) -> Iterator[None]:
    """Log one line, instead of an error, if the file system of `path` has no fsync for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(
            "fsync",
            f"{path.parent} is on a file system that cannot flush every file ({error.strerror}): a power "
            "failure may damage the newest ones",
        )


def _replaced(folder: Path) -> Path:
    """Return the temporary name of the folder that `folder` replaces; no user has a copy of that name."""
    return folder.with_name(f".{folder.name}.replaced")


def _warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(message)

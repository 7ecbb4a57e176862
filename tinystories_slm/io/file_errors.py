"""Errors of the file system as one line: the file, the cause and the fix."""

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinystories_slm.errors import UserError

ENVIRONMENT_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)
"""System errors whose cause is the machine or a path that the user named, wherever they occur."""
_WRITE_ERRORS = ENVIRONMENT_ERRORS | {errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR}
_FIXES = {
    errno.EDQUOT: "free disk space",
    errno.EFBIG: "use a file system and a limit (ulimit -f) for larger files",
    errno.EIO: "check the disk or the network drive",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ESTALE: "check the disk or the network drive",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOSPC: "free disk space",
}


def expand_user(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by the home folder.

    Raises:
        UserError: the home folder is unknown, as in a container whose user has no entry.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"path ({path}) begins with a home folder that is unknown; set HOME or use another path"
        ) from error


def check_regular_files(folder: Path, suffixes: Collection[str]) -> None:
    """Check that entries of `folder` with one of `suffixes` are files, or links to files.

    A program that opens a pipe waits for its writer, possibly for ever.

    Raises:
        UserError: one is a folder, a pipe, a device or a link to nothing.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes and not path.is_file():
            raise UserError(f"{path} must be a regular file; replace or delete it")


def check_not_a_pipe(option: str, path: Path) -> None:
    """Check that `path`, the value of `option`, is no pipe in a folder; `<(command)` of a shell may be used.

    Raises:
        UserError: it is a named pipe or a socket.
    """
    is_descriptor = path.parent.name == "fd" and path.parts[:2] in (("/", "dev"), ("/", "proc"))
    if not is_descriptor and (path.is_fifo() or path.is_socket()):
        raise UserError(f"{option} ({path}): must not be a named pipe; use a file")


def system_errno(error: BaseException) -> int | None:
    """Return the number of the system error in `error`; None if it is of another kind.

    safetensors and tokenizers state the number only in the message: `No space left on device (os error 28)`.
    """
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def file_error(name: str, error: BaseException) -> UserError:
    """Return the error of one line that `name`, an option or a file with its path, cannot be used."""
    number = system_errno(error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    fix = _FIXES.get(number, "use another path") if number is not None else "use another path"
    return UserError(f"{name} ({' '.join(reason.split())}); {fix}")


@contextmanager
def translate_write_errors(option: str, path: Path) -> Iterator[None]:
    """Translate a full disk, a missing permission or an unusable name in the block.

    Raises:
        UserError: `path`, the value of `option`, cannot be written.
    """
    try:
        yield
    except Exception as error:
        if system_errno(error) not in _WRITE_ERRORS or not _concerns(error, path):
            raise
        raise file_error(f"{option} ({path}) cannot be written to", error) from error


def _concerns(error: Exception, path: Path) -> bool:
    """Whether `error` names no file, or `path`, a file in it, a temporary name of it, or a parent of it."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return True
    named, own = os.path.abspath(error.filename), os.path.abspath(path)
    hidden = os.path.join(os.path.dirname(own), f".{os.path.basename(own)}")
    return named.startswith((own, hidden)) or own.startswith(named)

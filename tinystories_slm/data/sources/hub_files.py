"""Files of a dataset on the Hub, read over the network in blocks and without a copy on this disk."""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from tinystories_slm.data.sources import local
from tinystories_slm.data.sources.file_formats import first_line
from tinystories_slm.errors import UserError

_BUFFER_BYTES = 2**20


class HubPath(PurePosixPath):
    """Path of a file as `HfFileSystem` names it: `datasets/OWNER/NAME@COMMIT/FILE`."""

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file to be read, `mode` "rb"; each block is requested when it is needed.

        huggingface_hub repeats a failed request, five times. The blocks before are not read again.

        Raises:
            UserError: the file does not exist, or the Hub cannot be reached; also in a later read.
        """
        return io.BufferedReader(_RemoteFile(self), _BUFFER_BYTES)


class _RemoteFile(io.RawIOBase):
    """A file of the Hub whose errors are `UserError`: a reader takes an OSError for a damaged file."""

    def __init__(self, path: HubPath) -> None:
        from huggingface_hub import HfFileSystem

        self._path = path
        try:
            self._file = HfFileSystem(skip_instance_cache=True).open(str(path), "rb")
        except Exception as error:  # the types depend on the HTTP library
            raise _unreachable_error(path, error) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:
            raise _unreachable_error(self._path, error) from error


def read_remote_file(source: str, commit: str, file: str, text_column: str) -> Iterator[str | None]:
    """Yield the stories of a file of the dataset `source`.

    Raises:
        UserError: the file cannot be read.
    """
    return local.read_story_file(remote_path(source, commit, file), source, text_column)


def remote_path(source: str, commit: str, file: str) -> HubPath:
    """Return the path of a file of the dataset `source` at `commit`."""
    return HubPath(f"datasets/{source}@{commit}/{file}")


def _unreachable_error(path: HubPath, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read from the Hub ({type(error).__name__}: {first_line(error)}); check the "
        "connection, and run the same command again"
    )

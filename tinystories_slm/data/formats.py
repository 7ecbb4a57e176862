"""Story files of three formats, read as a stream: parquet, JSONL, and text with `<|endoftext|>`.

A reader yields the stories of one file in their order, `None` for a null, in bounded memory.
JSONL and text are read here rather than by `datasets`, to name the line or byte where a file is broken.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tinystories_slm.errors import InputError

SEPARATOR = "<|endoftext|>"
"""Stands between stories of a text file, and is the special token after each story."""

_READ_BYTES = 2**20
_MAX_STORY_BYTES = 2**24  # a longer one is no story: its separators or line ends are missing


def read_text(path: Path, text_column: str = "text") -> Iterator[str]:
    """Stories between `<|endoftext|>`, without the white space around them; line ends become `\\n`.

    Raises:
        InputError: no `<|endoftext|>` at all (one endless story would be a trap), or invalid UTF-8.
    """
    offset, rest, separated = 0, b"", False
    with _opened(path) as file:
        while chunk := file.read(_READ_BYTES):
            *stories, rest = (rest + chunk).split(SEPARATOR.encode())
            for story in stories:
                yield _decode(story, path, offset).strip()
                offset += len(story) + len(SEPARATOR)
                separated = True
            if len(rest) > _MAX_STORY_BYTES:
                raise _not_separated(path)
    if last := _decode(rest, path, offset).strip():
        if not separated:
            raise _not_separated(path)
        yield last


def read_jsonl(path: Path, text_column: str = "text") -> Iterator[str | None]:
    """The value at `text_column` of each line's object; blank lines are skipped.

    Raises:
        InputError: a line that is not a JSON object, lacks the key, or holds no Unicode string there.
    """
    offset, number = 0, 0
    with _opened(path) as file:
        while line := file.readline(_MAX_STORY_BYTES):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == _MAX_STORY_BYTES:
                raise InputError(f"{where} is over 16 MiB long; JSONL holds one object per line")
            if text := _decode(line, path, offset).strip():
                yield _json_story(text, text_column, where)
            offset += len(line)


def read_parquet(path: Path, text_column: str = "text") -> Iterator[str | None]:
    """The values of `text_column`.

    Raises:
        InputError: the file is corrupt, lacks the column, or holds other than strings in it.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_column(file.schema_arrow, text_column, path)
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds text that is not valid UTF-8 in column {text_column!r}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({_first_line(error)}); fetch or write it anew"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".txt": read_text,
}
"""Reader of each suffix; of a folder with several, the first one here is read."""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    with file:
        yield file


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Text of `raw`, which starts `offset` bytes into `path`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); "
            "save it as UTF-8"
        ) from error
    text = text.removeprefix("\ufeff") if offset == 0 else text  # a byte-order mark is not the story's
    return text.replace("\r\n", "\n")


def _json_story(line: str, text_column: str, where: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); JSONL holds one object per line") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is no JSON object; JSONL holds one per line, its story at {text_column!r}")
    if text_column not in record:
        raise InputError(f"{where} has no {text_column!r}, only {_names(record)}; set data.text_column")
    story = record[text_column]
    if story is None:
        return None
    if not isinstance(story, str):
        raise InputError(
            f"{where} holds {type(story).__name__}, not text, at {text_column!r}; set data.text_column"
        )
    if not story.isascii():
        try:
            story.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; UTF-8 cannot
            raise InputError(
                f"{where} holds an escape (\\u{ord(story[error.start]):04x}) that is no character; correct it"
            ) from error
    return story


def _check_column(schema: pa.Schema, text_column: str, path: Path) -> None:
    if text_column not in schema.names:
        raise InputError(
            f"{path} has no column {text_column!r}, only {_names(schema.names)}; set data.text_column"
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(
            f"{path} holds {kind}, not text, in column {text_column!r}; set data.text_column "
            f"to one of {_names(schema.names)}"
        )


def _not_separated(path: Path) -> InputError:
    return InputError(
        f"{path} has no {SEPARATOR} between its stories; put one after each story, "
        "or write JSONL with one story per line"
    )


def _names(names: object) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")

"""Readers of story files in three formats: parquet, JSONL, and text with `<|endoftext|>`.

A reader yields the stories of one file in order, with `None` for a null, in bounded memory. JSONL and
text do not go through `datasets`, so that an error message can give the line or byte of the fault.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tinystories_slm.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""Separator of stories in a text file, and special token after each story in the token files."""

_READ_BYTES = 2**20
_MAX_STORY_BYTES = 2**24  # a longer story means that separators or line ends are missing


def read_text(path: Path, text_column: str = "text") -> Iterator[str]:
    """Yield the stories between `<|endoftext|>`, stripped of white space; line ends become `\\n`.

    Raises:
        UserError: the file contains no `<|endoftext|>`, so it would be one huge story, or invalid UTF-8.
    """
    offset, rest, separated = 0, b"", False
    with _open_bytes(path) as file:
        while chunk := file.read(_READ_BYTES):
            *stories, rest = (rest + chunk).split(END_OF_TEXT.encode())
            for story in stories:
                yield _decode(story, path, offset).strip()
                offset += len(story) + len(END_OF_TEXT)
                separated = True
            if len(rest) > _MAX_STORY_BYTES:
                raise _missing_separator_error(path)
    if last := _decode(rest, path, offset).strip():
        if not separated:
            raise _missing_separator_error(path)
        yield last


def read_jsonl(path: Path, text_column: str = "text") -> Iterator[str | None]:
    """Yield the value of key `text_column` of each line's object; skip blank lines.

    Raises:
        UserError: a line is not a JSON object, lacks the key, or its value is not a valid Unicode string.
    """
    offset, line_number = 0, 0
    with _open_bytes(path) as file:
        while line := file.readline(_MAX_STORY_BYTES):
            line_number += 1
            where = f"{path}, line {line_number}"
            if len(line) == _MAX_STORY_BYTES:
                raise UserError(f"{where} is longer than 16 MiB; write one JSON object per line")
            if text := _decode(line, path, offset).strip():
                yield _json_story(text, text_column, where)
            offset += len(line)


def read_parquet(path: Path, text_column: str = "text") -> Iterator[str | None]:
    """Yield the values of column `text_column`.

    Raises:
        UserError: the file is corrupt, lacks the column, or the column does not contain strings.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_column(file.schema_arrow, text_column, path)
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} contains invalid UTF-8 in column {text_column!r}; write the file again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({first_line(error)}); download or write the file again"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".txt": read_text,
}
"""Reader of each file suffix; in a folder with several formats, the first suffix listed here is read."""


@contextmanager
def _open_bytes(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    with file:
        yield file


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Decode `raw`, which starts at byte `offset` of `path`, and normalize line ends to `\\n`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
    text = text.removeprefix("\ufeff") if offset == 0 else text  # drop the byte-order mark
    return text.replace("\r\n", "\n")


def _json_story(line: str, text_column: str, where: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; write one object per line, with key {text_column!r}")
    if text_column not in record:
        raise UserError(
            f"{where} has no key {text_column!r}, only {_join_names(record)}; set data.text_column"
        )
    story = record[text_column]
    if story is None:
        return None
    if not isinstance(story, str):
        raise UserError(
            f"{where}: {text_column!r} must be a string, not {type(story).__name__}; set data.text_column"
        )
    if not story.isascii():
        try:
            story.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON escapes allow an unpaired surrogate, UTF-8 does not
            raise UserError(
                f"{where} contains an unpaired surrogate (\\u{ord(story[error.start]):04x}); correct the line"
            ) from error
    return story


def _check_column(schema: pa.Schema, text_column: str, path: Path) -> None:
    if text_column not in schema.names:
        raise UserError(
            f"{path} has no column {text_column!r}, only {_join_names(schema.names)}; set data.text_column"
        )
    column_type = schema.field(text_column).type
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(column_type) for check in is_text):
        raise UserError(
            f"{path}: column {text_column!r} must contain strings, not {column_type}; "
            f"set data.text_column to one of {_join_names(schema.names)}"
        )


def _missing_separator_error(path: Path) -> UserError:
    return UserError(
        f"{path} has no {END_OF_TEXT} between its stories; add one after each story, "
        "or use JSONL with one story per line"
    )


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def first_line(error: BaseException) -> str:
    """First line of the message of `error`, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")

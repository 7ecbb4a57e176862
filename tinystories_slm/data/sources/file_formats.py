"""Readers of story files: parquet, JSONL, CSV, TSV, JSON and text, also compressed or in a tar archive.

A reader yields the stories of one file in order, with `None` for a null, in bounded memory. CSV, JSON and
text do not go through `datasets`, so that an error message can give the line or byte of the fault.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tinystories_slm.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""Separator of stories in a text file, and special token after each story in the token files."""

_READ_BYTES = 2**20
_MAX_STORY_BYTES = 2**24  # a longer story means that separators or line ends are missing
_MAX_EXPANDED_BYTES = 2**32  # of a compressed parquet file, which is copied to a temporary one
_EDGES = "\ufeff\0" + "".join(char for char in map(chr, range(0x3001)) if char.isspace())
_BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")
_SAMPLE_ROWS = 100


Reader = Callable[..., Iterator[str | None]]
"""Path, column and, for a member of an archive, its stream -> stories of the file."""


def read_text(path: Path, text_column: str = "text", stream: BinaryIO | None = None) -> Iterator[str]:
    """Yield the stories between `<|endoftext|>`, stripped of white space; line ends become `\\n`.

    Byte-order marks and NUL bytes at the ends of a story are removed: joined files have them in the middle.

    Raises:
        UserError: the file contains no `<|endoftext|>`, so it would be one huge story, a story that is longer
            than 16 MiB, or invalid UTF-8.
    """
    offset, rest, separated = 0, b"", False
    with _open_bytes(path, stream) as file:
        while chunk := file.read(_READ_BYTES):
            *stories, rest = (rest + chunk).split(END_OF_TEXT.encode())
            for story in stories:
                yield _strip(_decode(story, path, offset))
                offset += len(story) + len(END_OF_TEXT)
                separated = True
            if len(rest) > _MAX_STORY_BYTES:
                where = f"{path}, the story from byte {offset}"
                raise _too_long_error(where) if separated else _missing_separator_error(path)
    if last := _strip(_decode(rest, path, offset)):
        if not separated:
            raise _missing_separator_error(path)
        yield last


def read_jsonl(path: Path, text_column: str = "text", stream: BinaryIO | None = None) -> Iterator[str | None]:
    """Yield the value of key `text_column` of each line's object; skip blank lines.

    Raises:
        UserError: a line is not a JSON object, lacks the key, or its value is not a valid Unicode string.
    """
    offset, line_number = 0, 0
    with _open_bytes(path, stream) as file:
        while line := file.readline(_MAX_STORY_BYTES):
            line_number += 1
            where = f"{path}, line {line_number}"
            if len(line) == _MAX_STORY_BYTES:
                raise _too_long_error(where)
            if text := _decode(line, path, offset).strip():
                yield _story_of_record(_parse_line(text, where), text_column, where)
            offset += len(line)


def read_json(path: Path, text_column: str = "text", stream: BinaryIO | None = None) -> Iterator[str | None]:
    """Yield the value of key `text_column` of each object, or each string, of a JSON file.

    The file is one list, or objects one after another; line ends inside an object have no meaning.

    Raises:
        UserError: the file is not JSON, ends inside its list, or an object is not as `read_jsonl` needs it.
    """
    with _open_bytes(path, stream) as file:
        for value, where in _iter_json_values(path, file):
            yield _story_of_record(
                {text_column: value} if isinstance(value, str) else value, text_column, where
            )


def read_parquet(
    path: Path, text_column: str = "text", stream: BinaryIO | None = None
) -> Iterator[str | None]:
    """Yield the values of column `text_column`.

    Raises:
        UserError: the file is corrupt, lacks the column, or the column does not contain strings.
    """
    try:
        # A buffer would hold all columns of the file until its end.
        with _open_seekable(path, stream) as seekable, pq.ParquetFile(seekable, pre_buffer=False) as file:
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


def read_csv(
    path: Path, text_column: str = "text", stream: BinaryIO | None = None, *, delimiter: str = ","
) -> Iterator[str]:
    """Yield the fields of column `text_column`; the first row names the columns.

    A field with a delimiter, a quote or a line end is quoted, and a quote in it doubled (RFC 4180). Blank
    lines are skipped, and line ends in a field become `\\n`.

    Raises:
        UserError: the column is missing or occurs twice, a row has another number of fields, a quote is not
            closed, or the file contains invalid UTF-8.
    """
    with _open_bytes(path, stream) as file:
        csv.field_size_limit(_MAX_STORY_BYTES)  # the default, 131,072 characters, is less than a long story
        rows = csv.reader(_iter_lines(path, file), delimiter=delimiter, strict=True)
        column, names, start = 0, [], 1
        try:
            for row in rows:
                if row and not names:
                    names, column = row, _find_column(row, text_column, f"{path}, line {start}")
                elif row:
                    if len(row) != len(names):
                        raise UserError(
                            f"{path}, line {start} has {len(row)} fields, and the header {len(names)}; "
                            "quote a field that contains the delimiter or a line end"
                        )
                    yield row[column].replace("\r\n", "\n")
                start = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}, row that starts in line {start} cannot be read ({error}); quote each field that "
                "contains a quote, and double the quotes in it"
            ) from error


READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".json": read_json,
    ".txt": read_text,
}
"""Reader of each file suffix; in a folder with several formats, the first suffix listed here is read."""

_DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
}
_ARCHIVE = re.compile(r"\.(tar|tgz|tar(\.gz|\.xz|\.zst))", re.IGNORECASE)

KNOWN_FORMATS = f"{', '.join(READERS)}, or one of these in .gz, .xz, .zst or a tar archive"
"""Suffixes of the files that can be read, for error messages."""


def format_of(path: PurePath) -> str | None:
    """Return the key of `READERS` for a file name such as `train.JSONL.gz`; None for another file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _DECOMPRESSORS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_file(path: Path, text_column: str, stream: BinaryIO | None = None) -> Iterator[str | None]:
    """Yield the stories of a file of a known format.

    Raises:
        UserError: the file cannot be read, or its rows are lines of stories.
    """
    suffix = str(format_of(path))
    if stream is None:
        _check_not_lfs_pointer(path)
        rows = READERS[suffix](path, text_column)
    else:
        rows = READERS[suffix](path, text_column, stream)
    return rows if suffix == ".txt" else reject_lines(rows, str(path))


def reject_lines(rows: Iterable[str | None], where: str) -> Iterator[str | None]:
    """Yield `rows`; raise if they are the lines of a text file, as its load with `datasets` gives.

    Raises:
        UserError: a row is `<|endoftext|>` alone or longer than 16 MiB, or of the first 100 rows none has a
            line end and at least a quarter is blank.
    """
    num_blank = num_broken = 0
    for number, row in enumerate(rows, start=1):
        if row is not None and len(row) > _MAX_STORY_BYTES:
            raise _too_long_error(f"{where}, row {number}")
        text = "a null" if row is None else row.strip()
        num_blank += not text
        num_broken += "\n" in text
        reason = ""
        if text == END_OF_TEXT:
            reason = f"row {number} is {END_OF_TEXT} alone"
        elif number == _SAMPLE_ROWS and num_blank >= _SAMPLE_ROWS // 4 and not num_broken:
            reason = f"{num_blank} of the first {number} rows are blank, and no row has a line end"
        if reason:
            raise UserError(
                f"{where}: {reason}, so its rows are lines of stories; "
                "use the text file that they come from, or write one story per row"
            )
        yield row


def is_archive(path: PurePath) -> bool:
    """Whether the name is that of a tar archive, compressed or not."""
    return _ARCHIVE.fullmatch("".join(path.suffixes[-2:])) is not None or bool(
        _ARCHIVE.fullmatch(path.suffix)
    )


def list_archive(archive: Path) -> list[PurePosixPath]:
    """Return the paths of the files in a tar archive, in its order.

    Raises:
        UserError: the archive cannot be read, or a path leaves it.
    """
    with _open_archive(archive) as tar:
        return [_member_path(archive, member) for member in tar if member.isfile()]


def read_archive(archive: Path, is_wanted: Callable[[str], bool], text_column: str) -> Iterator[str | None]:
    """Yield the stories of the files of a tar archive whose path `is_wanted`; nothing is extracted.

    Raises:
        UserError: the archive or a file in it cannot be read.
    """
    with _open_archive(archive) as tar:
        for member in tar:
            if member.isfile() and is_wanted(str(path := _member_path(archive, member))):
                yield from read_file(archive / path, text_column, tar.extractfile(member))


class _Member(tarfile.TarInfo):
    """Header of a member, whose name or other attributes are of plausible size: tarfile reads them whole."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buf, encoding, errors)
        attributes = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if member.type in attributes and member.size > _READ_BYTES:
            raise tarfile.ReadError(f"a name or attribute of {member.size:,} bytes")
        return member


@contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive to be read once from its start, without a seek."""
    try:
        with _open_bytes(archive) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
            yield tar
    except tarfile.TarError as error:
        raise UserError(
            f"{archive} cannot be read as a tar archive ({first_line(error)}); download it again"
        ) from error


def _member_path(archive: Path, member: tarfile.TarInfo) -> PurePosixPath:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive} contains {member.name!r}, a path outside the archive; write it again")
    return path


@contextmanager
def _open_bytes(path: Path, stream: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Open the decompressed bytes of the file `path`, or of its content `stream` in an archive."""
    decompress = _DECOMPRESSORS.get(path.suffix.lower())
    if path.suffix.lower() == ".tgz":
        decompress = _DECOMPRESSORS[".gz"]
    try:
        with ExitStack() as files:
            file = stream or files.enter_context(path.open("rb"))
            yield files.enter_context(decompress(file)) if decompress else file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        raise UserError(
            f"{path} cannot be decompressed ({first_line(error)}); download or compress it again"
        ) from error


@contextmanager
def _open_seekable(path: Path, stream: BinaryIO | None) -> Iterator[Path | BinaryIO]:
    """Yield what a parquet reader can seek in: the path, or a temporary copy of a stream."""
    if stream is None and path.suffix.lower() not in _DECOMPRESSORS:
        if isinstance(path, Path):
            yield path
        else:  # not of this disk
            with path.open("rb") as file:
                yield file
        return
    with _open_bytes(path, stream) as file, tempfile.TemporaryFile() as copy:
        _copy_bounded(path, file, copy)
        copy.seek(0)
        yield copy


def _copy_bounded(path: Path, file: BinaryIO, copy: BinaryIO) -> None:
    """Copy a file that expands to a plausible size: no parquet file holds much more than it is compressed.

    Raises:
        UserError: `path` expands to more than `_MAX_EXPANDED_BYTES` and 20 times its size.
    """
    size = path.stat().st_size if isinstance(path, Path) and path.is_file() else 0  # 0 in an archive
    left = max(_MAX_EXPANDED_BYTES, 20 * size)
    while chunk := file.read(_READ_BYTES):
        left -= len(chunk)
        if left < 0:
            raise UserError(
                f"{path} expands to more than {_MAX_EXPANDED_BYTES / 2**30:g} GiB and 20 times its size; "
                "decompress it yourself if that is right"
            )
        copy.write(chunk)


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Decode `raw`, which starts at byte `offset` of `path`, and normalize line ends to `\\n`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid_utf8_error(path, offset, error) from error
    text = text.removeprefix("\ufeff") if offset == 0 else text  # drop the byte-order mark
    return text.replace("\r\n", "\n")


def _strip(story: str) -> str:
    """Remove white space, byte-order marks and NUL characters at both ends."""
    return story.strip(_EDGES)


def _parse_line(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); write one JSON object per line") from error


def _iter_json_values(path: Path, file: BinaryIO) -> Iterator[tuple[object, str]]:
    """Yield each value of a JSON list, or of values one after another, with its place in the file."""
    chunks = _iter_decoded(path, file)
    decoder, text, position, line, number, in_list = json.JSONDecoder(), "", 0, 1, 1, False
    while True:
        start = _BETWEEN_VALUES.match(text, position).end()
        if text[start : start + 1] == ("]" if in_list else "["):
            in_list = not in_list
            line, position = line + text.count("\n", position, start), start + 1
            continue
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line, text, position = line + text.count("\n", position, start), text[start:], 0
            if len(text) < _MAX_STORY_BYTES and (chunk := next(chunks, "")):
                text += chunk  # the value may go on there
                continue
            if not text and not in_list:
                return
            if len(text) >= _MAX_STORY_BYTES and "Unterminated string" in str(error):
                raise _too_long_error(f"{path}, item {number} (line {line})") from error
            reason = getattr(error, "msg", error) if text else "the file ends inside its list"
            raise UserError(
                f"{path}, item {number} (line {line}) is not valid JSON ({reason}); write the file again"
            ) from error
        line += text.count("\n", position, start)
        yield value, f"{path}, item {number} (line {line})"
        line += text.count("\n", start, end)
        position, number = end, number + 1


def _iter_decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks, without a byte-order mark."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = file.read(_READ_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _invalid_utf8_error(path, offset - pending, error) from error
        if text := text.removeprefix("\ufeff") if offset == 0 else text:
            yield text
        offset += len(chunk)
        if not chunk:
            return


def _iter_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends; only `\\n` ends a line."""
    rest, line_number = "", 0
    for text in _iter_decoded(path, file):
        *lines, rest = (rest + text).split("\n")
        line_number += len(lines)
        yield from (f"{line}\n" for line in lines)
        if len(rest) > _MAX_STORY_BYTES:
            raise _too_long_error(f"{path}, line {line_number + 1}")
    if rest:
        yield rest


def _story_of_record(record: object, text_column: str, where: str) -> str | None:
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


def _find_column(names: Sequence[str], text_column: str, where: object) -> int:
    """Return the index of column `text_column`; UserError if it is missing or occurs twice."""
    if text_column not in names:
        raise UserError(
            f"{where} has no column {text_column!r}, only {_join_names(names)}; set data.text_column"
        )
    if names.count(text_column) > 1:
        raise UserError(
            f"{where} has {names.count(text_column)} columns named {text_column!r}; rename all but one, or "
            "set data.text_column"
        )
    return names.index(text_column)


def _check_not_lfs_pointer(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise UserError(
                f"{path} is a pointer of Git LFS and not the file itself; run `git lfs pull` in its folder"
            )


def _check_column(schema: pa.Schema, text_column: str, path: Path) -> None:
    _find_column(schema.names, text_column, path)
    column_type = schema.field(text_column).type
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(column_type) for check in is_text):
        raise UserError(
            f"{path}: column {text_column!r} must contain strings, not {column_type}; "
            f"set data.text_column to one of {_join_names(schema.names)}"
        )


def _invalid_utf8_error(path: Path, offset: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{path} is not valid UTF-8 at byte {offset + error.start} (0x{error.object[error.start]:02x}); "
        "save the file as UTF-8"
    )


def _too_long_error(where: str) -> UserError:
    return UserError(f"{where} is longer than 16 MiB, which no story is; check that its end is marked")


def _missing_separator_error(path: Path) -> UserError:
    return UserError(
        f"{path} has no {END_OF_TEXT} between its stories; add one after each story, "
        "or use JSONL with one story per line"
    )


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(repr(name if len(name) <= 60 else f"{name[:57]}...") for name in names) or "nothing"


def first_line(error: BaseException) -> str:
    """First line of the message of `error`, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")

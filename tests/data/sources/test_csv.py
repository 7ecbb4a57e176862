"""CSV and TSV files: the same stories as from other formats, and the line of each error."""

import csv
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story_files import compress, write_jsonl

from tinystories_slm.data.source_stories import load_stories
from tinystories_slm.data.sources.file_formats import read_csv
from tinystories_slm.errors import UserError

STORIES = ['Tom said "hi", twice.', "Zoë saw a 🦊.\n\nIt hid.", "a\u2028b,c\td", "x" * 200_000]


def write_csv(path: Path, stories: list[str], delimiter: str = ",", end: str = "\r\n") -> Path:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerows([["id", "text"], *enumerate(stories)])
    path.write_bytes("\ufeff".encode() + file.getvalue().encode())
    return path


def stories_of(source: Path, **options: object) -> list[str]:
    return list(load_stories(str(source), "train", validation_split=None, **options)["text"])


def test_csv_and_tsv_hold_the_stories_of_other_formats(tmp_path: Path) -> None:
    expected = stories_of(write_jsonl(tmp_path / "a.jsonl", STORIES))
    plain = write_csv(tmp_path / "a.CSV", STORIES)
    assert stories_of(plain) == stories_of(write_csv(tmp_path / "b.tsv", STORIES, "\t", "\n")) == expected
    for suffix in (".gz", ".xz", ".zst"):
        assert stories_of(compress(plain, suffix)) == expected
    with tarfile.open(tmp_path / "a.TAR.GZ", "w:gz") as tar:
        tar.add(plain, "data/train.csv")
    assert stories_of(tmp_path / "a.TAR.GZ") == expected
    assert stories_of(plain, text_column="id") == ["0", "1", "2", "3"]
    # CSV comes before text and JSON, of which a folder of CSV files has notes.
    folder = tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "train.csv", ["one"])
    (folder / "notes.txt").write_text("a note")
    assert stories_of(folder) == ["one"]


@settings(max_examples=60, deadline=None)
@given(stories=st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=5))
def test_every_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    expected = [story.replace("\r\n", "\n") for story in stories]
    assert list(read_csv(write_csv(path, stories))) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'text,n\n"one\n\ntwo",1\nthree\n', "a.csv, line 5 has 1 fields, and the header 2; quote a field"),
        (b"text\nTom, who ran.\n", "a.csv, line 2 has 2 fields, and the header 1; quote a field"),
        (b"text,id,text\na,1,b\n", "a.csv, line 1 has 2 columns named 'text'; rename all but one"),
        (b"story,n\na,1\n", "a.csv, line 1 has no column 'text', only 'story', 'n'; set data.text_column"),
        (b'text\na\n"b\nc\n', "a.csv, row that starts in line 3 cannot be read (unexpected end of data)"),
        (b'text\n"a" b\n', "a.csv, row that starts in line 2 cannot be read (',' expected after '\"')"),
        (b"text\na\n\xffb\n", "a.csv is not valid UTF-8 at byte 7 (0xff); save the file as UTF-8"),
        (b"text\n" + b"a" * (2**24 + 1), "a.csv, line 2 is longer than 16 MiB, which no story is"),
        (b'text\na\n"' + b"a\n" * (2**23 + 1), "row that starts in line 3 cannot be read (field larger than"),
    ],
)
def test_csv_errors_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_csv(tmp_path / "a.csv"))
    assert message in str(error.value) and "\n" not in str(error.value)

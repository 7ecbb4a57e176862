"""Bad input: one line that names the file and the fix, bounded memory, and nothing half-written."""

import errno
import gzip
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from story_files import write_jsonl, write_parquet, write_text

from tinystories_slm.config import DataArgs
from tinystories_slm.data.raw_stories import download_data
from tinystories_slm.data.sources import file_formats
from tinystories_slm.errors import UserError

MIB = 2**20


def error_line(source: Path, **options: object) -> str:
    """Return the error of a download of `source`, which leaves no story behind."""
    args = DataArgs(source=str(source), data_dir=source.parent / "data of the test", **options)
    with pytest.raises(UserError) as error:
        download_data(args)
    assert [path.name for path in args.data_dir.iterdir()] in ([], [".lock"])
    line = str(error.value)
    assert "\n" not in line
    return line


def test_parquet_with_a_damaged_page_is_rejected(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"Tom saw {n * 7919} foxes." for n in range(5000)])
    content = bytearray(path.read_bytes())
    for offset in range(4, len(content) // 2, 50):  # in the pages, not in the description at the end
        content[offset] ^= 0xFF
    path.write_bytes(content)
    assert "a.parquet cannot be read as parquet (" in error_line(path)
    assert "download or write the file again" in error_line(path)


def test_columns_of_the_same_name_are_rejected(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet has 2 columns named 'text'; rename all but one" in error_line(tmp_path / "a.parquet")


def test_an_empty_split_is_rejected(tmp_path: Path) -> None:
    for number, (train, validation) in enumerate(((["a"], []), ([], ["b"]), (["a"], [None, " "]))):
        folder = tmp_path / f"folder{number}"
        write_parquet(folder / "train.parquet", train)
        write_parquet(folder / "validation.parquet", validation)
        split = "validation" if train else "train"
        assert f"has no {split} stories" in error_line(folder)


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_story_of_50_mb_is_rejected(tmp_path: Path, name: str) -> None:
    story, path = "word " * (10 * MIB), tmp_path / name
    expected = f"{name}, line 2 is longer than 16 MiB, which no story is; check that its end is marked"
    if name == "a.txt":
        write_text(path, [story])
        expected = "a.txt has no <|endoftext|> between its stories"
    elif name == "b.txt":
        write_text(path, ["one", story])
        expected = "b.txt, the story from byte 17 is longer than 16 MiB, which no story is"
    elif name == "a.parquet":
        write_parquet(path, ["one", story])
        expected = "a.parquet, row 2 is longer than 16 MiB, which no story is"
    elif name == "a.csv":
        path.write_text(f"text\n{story}\n")
    elif name == "a.jsonl":
        write_jsonl(path, ["one", story])
    else:
        path.write_text(json.dumps([{"text": "one"}, {"text": story}]))
        expected = "a.json, item 2 (line 1) is longer than 16 MiB, which no story is"
    assert expected in error_line(path)


def zeros(suffix: str, num_mib: int) -> bytes:
    """Return compressed zeros, `num_mib` MiB of them."""
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as file:
            for _ in range(num_mib):
                file.write(bytes(MIB))
        return sink.getvalue().to_pybytes()
    return {".gz": gzip.compress, ".xz": lzma.compress}[suffix](bytes(MIB)) * num_mib


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "has no <|endoftext|> between its stories"),
        ("a.jsonl", "line 1 is longer than 16 MiB"),
        ("a.json", "item 1 (line 1) is not valid JSON"),
        ("a.csv", "line 1 is longer than 16 MiB"),
        ("a.parquet", "expands to more than 0.0625 GiB and 20 times its size; decompress it yourself"),
    ],
)
def test_a_small_file_that_expands_to_much_is_rejected_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str, message: str
) -> None:
    monkeypatch.setattr(file_formats, "_MAX_EXPANDED_BYTES", 64 * MIB)
    path = tmp_path / (name + suffix)
    path.write_bytes(zeros(suffix, 128))
    assert path.stat().st_size < MIB
    tracemalloc.start()
    try:
        line = error_line(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert f"{name}{suffix}" in line and message in line
    assert peak < 100 * MIB


def test_a_tar_archive_with_a_name_of_64_mib_is_rejected(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 64 * MIB
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(name.tobuf()) + zeros(".gz", 64))
    expected = "a.tar.gz cannot be read as a tar archive (a name or attribute of 67,108,864 bytes)"
    assert expected in error_line(path)


def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "train.txt").write_text("not a story")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 7\n"
    for name in ("train.parquet", "train.txt", "train.jsonl"):
        (folder / name).write_text(pointer)
        assert "is a pointer of Git LFS and not the file itself; run `git lfs pull`" in error_line(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("fault", ["limit", "disk"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """`limit`: the system ends a write in the middle of a file; `disk`: it has no space for a row group."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"{n * 7919} {n**5}" for n in range(40_000)])
    if fault == "disk":
        monkeypatch.setattr(pq.ParquetWriter, "write_table", raise_no_space(after=2))
        message = "data.data_dir ({}) cannot be written to (No space left on device); free disk space"
        assert error_line(source) == message.format(tmp_path / "data of the test")
    else:
        resource = pytest.importorskip("resource", reason="a limit on the size of files needs POSIX")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            line = error_line(source)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written to (" in line and "File too large" in line
    assert download_data(DataArgs(source=str(source), data_dir=tmp_path / "data of the test")).is_dir()


def raise_no_space(*, after: int) -> Callable[..., None]:
    write_table, num_calls = pq.ParquetWriter.write_table, 0

    def write(self: pq.ParquetWriter, table: pa.Table) -> None:
        nonlocal num_calls
        num_calls += 1
        if after < num_calls <= after + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(self, table)

    return write

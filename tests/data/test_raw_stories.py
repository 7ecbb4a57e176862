"""Sources: same stories from every format, stable holdout split, and one-line error messages."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from story_files import compress, write_jsonl, write_parquet, write_text

from tinystories_slm import grammar
from tinystories_slm.config import DataArgs
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.source_stories import in_validation, load_stories, resolve_revision
from tinystories_slm.data.sources import hub as hub_module
from tinystories_slm.data.sources.folder_names import folder_name
from tinystories_slm.errors import UserError

STORIES = ["Tom ran.", "x", "Zoë saw a 🦊.\n\nIt hid.", "  Sue sat. ", "Tom ran."]
SHA = "0123456789abcdef0123456789abcdef01234567"


def load_split(source: Path | str, split: str = "train", **options: object) -> list[str]:
    """Every story of a split, without a holdout split."""
    dataset = load_stories(str(source), split, validation_split=None, **options)
    assert dataset.column_names == ["text"]
    return list(dataset["text"])


def data_args(tmp_path: Path, source: Path | str, **options: object) -> DataArgs:
    return DataArgs(source=str(source), data_dir=tmp_path / "data", **options)


def error_line(tmp_path: Path, source: Path | str, **options: object) -> str:
    """Return the one-line error of a failed download of `source`, and check that it left no files."""
    args = data_args(tmp_path, source, **options)
    with pytest.raises(UserError) as error:
        download_data(args)
    assert not list(args.data_dir.glob("raw*"))
    line = str(error.value)
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------ file formats


def test_parquet_and_jsonl_keep_stories_unchanged(tmp_path: Path) -> None:
    assert load_split(write_parquet(tmp_path / "a.parquet", STORIES)) == STORIES
    assert load_split(write_jsonl(tmp_path / "a.jsonl", STORIES)) == STORIES
    assert load_split(write_jsonl(tmp_path / "b.jsonl", STORIES, "story"), text_column="story") == STORIES


def test_text_splits_at_end_of_text_and_strips_white_space(tmp_path: Path) -> None:
    assert load_split(write_text(tmp_path / "a.txt", STORIES)) == [story.strip() for story in STORIES]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.<|endoftext|>Three.\n\n\n")
    assert load_split(tmp_path / "b.txt") == ["One.\nTwo.", "Three."]


def test_text_story_may_span_several_read_chunks(tmp_path: Path) -> None:
    stories = ["ä" * 700_001, "b" * (2**20 - 15), "é", "c" * 2_500_000]
    assert load_split(write_text(tmp_path / "a.txt", stories)) == stories


def test_null_and_blank_stories_are_dropped_and_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "train.parquet", ["a", None, "", " \n\t", "b", None])
    write_parquet(tmp_path / "in" / "validation.parquet", ["c", ""])
    folder = download_data(data_args(tmp_path, tmp_path / "in"))
    assert RawManifest.load(folder / "source.json").splits == {
        "train": {"num_stories": 2, "num_bytes": 2, "num_empty_dropped": 2, "num_null_dropped": 2},
        "validation": {"num_stories": 1, "num_bytes": 1, "num_empty_dropped": 1, "num_null_dropped": 0},
    }
    assert list(iter_raw_stories(tmp_path / "data", "train")) == ["a", "b"]


def test_every_parquet_string_type_is_read(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", None, "a"]).cast(kind)}), tmp_path / "a.parquet")
        assert load_split(tmp_path / "a.parquet") == ["a", "a"]


def test_folder_with_several_formats_uses_parquet_by_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ["second"])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ["first"])
    write_parquet(tmp_path / "deep" / "TinyStoriesV2-GPT4-valid.parquet", ["held out"])
    write_parquet(tmp_path / "test" / "0.parquet", ["tested"])
    write_parquet(tmp_path / ".hidden" / "train.parquet", ["hidden"])
    write_jsonl(tmp_path / "train.jsonl", ["not read"])
    assert load_split(tmp_path) == ["first", "second"]
    assert load_split(tmp_path, "validation") == ["held out"]
    assert load_split(tmp_path, "test") == ["tested"]
    assert "reading .parquet files, skipping .jsonl files" in caplog.text


def test_files_without_a_split_name_are_for_training(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ["1"])
    write_text(tmp_path / "dev.txt", ["2"])
    assert (load_split(tmp_path), load_split(tmp_path, "validation")) == (["1"], ["2"])
    write_text(tmp_path / "my_train.txt", ["3"])
    assert load_split(tmp_path) == ["3"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files_hold_the_same_stories(tmp_path: Path, suffix: str) -> None:
    for name in ("a.JSONL", "a.json", "a.parquet", "a.txt"):
        stories = [story.strip() for story in STORIES]
        write = {"a.parquet": write_parquet, "a.txt": write_text}.get(name, write_jsonl)
        plain = write(tmp_path / name, stories)
        assert load_split(compress(plain, suffix)) == stories
    half = tmp_path / f"half.txt{suffix}"
    half.write_bytes((tmp_path / f"a.txt{suffix}").read_bytes()[:-9])
    assert f"half.txt{suffix} cannot be decompressed" in error_line(tmp_path, half)
    half.write_bytes(b"not compressed")
    assert f"half.txt{suffix} cannot be decompressed" in error_line(tmp_path, half)


def test_json_file_is_a_list_or_objects_over_several_lines(tmp_path: Path) -> None:
    records = [{"id": 1, "text": story, "words": ["a", [1, "]"]]} for story in STORIES]
    many = [{"text": f"{number} " + "x" * 1000} for number in range(3000)]  # several read chunks
    for name, content, expected in (
        ("list", json.dumps(records), STORIES),
        ("pretty list", json.dumps(records, indent=2), STORIES),
        ("pretty objects", "\n".join(json.dumps(record, indent=1) for record in records), STORIES),
        ("strings", "\ufeff" + json.dumps(STORIES), STORIES),
        ("lines", "\n".join(map(json.dumps, records)), STORIES),
        ("null", '[{"text": null}, {"text": "a"}]', ["a"]),
        ("large", json.dumps(many), [record["text"] for record in many]),
    ):
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
        assert load_split(tmp_path / f"{name}.json") == expected, name


def test_json_errors_give_item_and_line(tmp_path: Path) -> None:
    for content, message in (
        (b'[\n{"text": "a"},\n{"text" "b"}]', "item 2 (line 3) is not valid JSON (Expecting ':' delimiter)"),
        (b'[{"text": "a"},\n', "item 2 (line 2) is not valid JSON (the file ends inside its list)"),
        (b'{"text": "a"}\n{"text":', "item 2 (line 2) is not valid JSON"),
        (b'[{"text": "a"}, 7]', "item 2 (line 1) is not a JSON object"),
        (b'[{"text": "a"}, {"story": "b"}]', "item 2 (line 1) has no key 'text', only 'story'"),
        (b'[{"text": "a\xff"}]', "is not valid UTF-8 at byte 12 (0xff)"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        assert message in error_line(tmp_path, tmp_path / "a.json")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tgz', 'gz').replace('tar', '')}") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_archive_is_read_as_a_folder(tmp_path: Path) -> None:
    train = json.dumps([{"text": "one"}, {"text": "two"}]).encode()
    files = {
        "./data/valid01.json": b'[{"text": "five"}]',
        "./data/train01.json": train,
        "./data/train02.json.gz": gzip.compress(b'[{"text": "three"}]'),
        "./._train01.json": b"not JSON",
        "./dataset_infos.json": b"{}",
        "./notes.txt": b"not a story",
    }
    for name in ("a.tar", "a.tar.gz", "a.tar.xz", "a.tgz"):
        archive = write_tar(tmp_path / name, files)
        assert load_split(archive) == ["one", "two", "three"]
        assert load_split(archive, "validation") == ["five"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tar(folder / "b.tar.gz", files)
    assert load_split(folder) == ["one", "two", "three"]
    assert resolve_revision(str(folder)) != resolve_revision(str(folder / "b.tar.gz"))
    write_parquet(folder / "train.parquet", ["other"])
    assert load_split(folder) == ["other"]


def test_tar_errors_name_the_archive(tmp_path: Path) -> None:
    story = b"a<|endoftext|>"
    for name in ("../a.txt", "/tmp/a.txt"):
        archive = write_tar(tmp_path / "a.tar", {"b.txt": story, name: story})
        assert f"a.tar contains '{name}', a path outside the archive" in error_line(tmp_path, archive)
    archive = write_tar(tmp_path / "a.tar.gz", {"a.txt": story, "b.txt": b"one\xff" + story})
    assert "a.tar.gz/b.txt is not valid UTF-8 at byte 3" in error_line(tmp_path, archive)
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes())[:700]))
    assert "a.tar.gz cannot be read as a tar archive" in error_line(tmp_path, archive)
    archive.write_bytes(archive.read_bytes()[:-12])
    assert "a.tar.gz cannot be decompressed" in error_line(tmp_path, archive)


def test_metadata_beside_the_stories_is_not_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a-train.txt", ["one"])
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "LICENSE.txt", "README.txt"):
        (tmp_path / name).write_text("{}\n")
    assert load_split(tmp_path) == ["one"]


def test_joined_text_files_with_marks_and_zeros_are_clean(tmp_path: Path) -> None:
    one = b"\xef\xbb\xbf<|endoftext|>\r\nOne.\r\n<|endoftext|>\r\n"
    (tmp_path / "a.txt").write_bytes(one + b"\xef\xbb\xbfTwo.\n<|endoftext|>\n" + one + b"\0" * 4096)
    assert load_split(tmp_path / "a.txt") == ["One.", "Two.", "One."]


def test_end_of_text_at_the_ends_of_a_row_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        "Tom ran.<|endoftext|>",
        "<|endoftext|>\nSue sat.\n\nIt hid. <|endoftext|> \n",
        " x ",
        "a <|endoftext|> b ",
    ]
    rows += ["<|endoftext|><|endoftext|>"]
    expected = ["Tom ran.", "Sue sat.\n\nIt hid.", " x ", "a <|endoftext|> b "]
    for source in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        caplog.clear()
        assert load_split(source) == expected
        assert caplog.text.count(f"{source}: <|endoftext|> at the end of a row separates stories") == 1
        assert caplog.text.count(f"{source}: <|endoftext|> within a row is plain text") == 1


def test_rows_that_are_lines_of_stories_are_rejected(tmp_path: Path) -> None:
    lines = ["Tom saw a fox.", "", "They ran.", "<|endoftext|>", ""]
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    assert "a.jsonl: row 4 is <|endoftext|> alone, so its rows are lines of stories" in error_line(
        tmp_path, source
    )
    lines = [line for number in range(60) for line in (f"Tom saw {number} foxes.", "")]
    source = write_parquet(tmp_path / "a.parquet", lines)
    assert "50 of the first 100 rows are blank, and no row has a line end" in error_line(tmp_path, source)
    lines[0] = "Tom saw a fox.\nHe ran."  # a story, so that blank rows are only blank
    assert len(load_split(write_parquet(tmp_path / "a.parquet", lines))) == 60


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="needs the cases in shared/cases")
@pytest.mark.parametrize(
    ("name", "column", "num_stories"),
    [
        ("all_data_json", "story", 400),
        ("bom_cat/stories.txt", "text", 400),
        ("crlf_txt/stories.txt", "text", 400),
        ("gz", "text", 400),
        ("jsonl_eos/stories.jsonl", "text", 400),
        ("nel/stories.jsonl", "text", 400),
        ("u2028/stories.jsonl", "text", 400),
    ],
)
def test_shared_case_is_read(name: str, column: str, num_stories: int) -> None:
    stories = load_split(SHARED / "cases" / name, text_column=column)
    assert len(stories) == num_stories
    assert not [story for story in stories if any(mark in story for mark in ("\ufeff", "\r", "<|end"))]


# ------------------------------------------------------------------------------------------ holdout split


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_larger_holdout_contains_the_smaller(story: str, one: float, other: float) -> None:
    assert in_validation(story, min(one, other)) <= in_validation(story, max(one, other))


def test_holdout_takes_the_configured_fraction() -> None:
    taken = sum(in_validation(f"story {number}", 0.05) for number in range(20_000))
    assert 900 < taken < 1100
    assert in_validation("Tom ran.", 0.389) and not in_validation("Tom ran.", 0.388)  # sha256: 0.3884


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=3).filter(str.strip), min_size=40, max_size=80))
def test_story_stays_in_its_split_as_the_data_grows(
    tmp_path_factory: pytest.TempPathFactory, stories: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("growing")
    splits: list[dict[str, set[str]]] = []
    stories += ["one", "two", "three", "four", "five", "six"]  # enough for both splits
    for number, part in enumerate((stories[::-1], stories + [f"more {i}" for i in range(50)])):
        source = str(write_jsonl(folder / f"{number}.jsonl", part))
        read = {
            split: list(load_stories(source, split, validation_fraction=0.4)["text"])
            for split in ("train", "validation")
        }
        assert sorted(read["train"] + read["validation"]) == sorted(part)  # no story is lost or duplicated
        splits.append({split: set(found) for split, found in read.items()})
        assert not splits[-1]["train"] & splits[-1]["validation"]
    assert splits[0]["train"] <= splits[1]["train"] and splits[0]["validation"] <= splits[1]["validation"]


def test_holdout_option_replaces_the_validation_split(tmp_path: Path) -> None:
    stories = [f"story {number}" for number in range(100)]
    write_parquet(tmp_path / "train.parquet", stories)
    write_parquet(tmp_path / "validation.parquet", ["own"])
    assert list(load_stories(str(tmp_path), "validation")["text"]) == ["own"]
    holdout = {
        s: list(load_stories(str(tmp_path), s, validation_split="holdout")["text"])
        for s in ("train", "validation")
    }
    assert holdout["validation"] == [story for story in stories if in_validation(story, 0.05)]
    assert holdout["train"] == [story for story in stories if not in_validation(story, 0.05)]


def test_max_stories_applies_before_the_holdout_split(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ["", *(f"story {number}" for number in range(100))]))
    options = {"validation_fraction": 0.3, "max_stories": 50}
    read = [list(load_stories(source, split, **options)["text"]) for split in ("train", "validation")]
    assert sorted([*read[0], *read[1]]) == sorted(f"story {number}" for number in range(50))


def test_builtin_corpus_is_generated_and_split(tmp_path: Path) -> None:
    args = data_args(tmp_path, "builtin", max_stories=200)
    folder = download_data(args)
    manifest = RawManifest.load(folder / "source.json")
    assert manifest.provenance.revision == f"grammar {grammar.VERSION}"
    splits = {split: list(iter_raw_stories(args.data_dir, split)) for split in ("train", "validation")}
    corpus = list(grammar.generate_corpus(200, seed=0))
    assert splits["validation"] == [story for story in corpus if in_validation(story, 0.05)]
    assert splits["train"] == [story for story in corpus if not in_validation(story, 0.05)]
    for split, stories in splits.items():
        assert manifest.splits[split]["num_stories"] == len(stories)
        assert manifest.splits[split]["num_bytes"] == sum(len(story.encode()) for story in stories)


# -------------------------------------------------------------------------------------- existing downloads


def test_existing_download_is_kept(tmp_path: Path) -> None:
    args = data_args(tmp_path, write_jsonl(tmp_path / "a.jsonl", STORIES), validation_fraction=0.5)
    folder = download_data(args)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"train.parquet", "validation.parquet", "source.json"}
    assert download_data(args) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_options_and_changed_files_replace_the_stories(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    download_data(data_args(tmp_path, source, validation_fraction=0.5))
    folder = download_data(data_args(tmp_path, "builtin", validation_fraction=0.4, max_stories=9))
    for part in (
        "building the stories of ",
        f"data.source is '{source}' (configured: 'builtin')",
        "data.validation_fraction is 0.5 (configured: 0.4)",
        "data.max_stories is None (configured: 9)",
    ):
        assert part in caplog.text
    stories = [story for split in ("train", "validation") for story in iter_raw_stories(folder.parent, split)]
    assert sorted(stories) == sorted(grammar.generate_corpus(9))
    download_data(data_args(tmp_path, source, validation_fraction=0.5))
    write_jsonl(source, [*STORIES, "One more."])
    download_data(data_args(tmp_path, source, validation_fraction=0.5))
    assert re.search(r"a\.jsonl' has changed from sha256:\w+ to sha256:\w+", caplog.text)
    stories = [story for split in ("train", "validation") for story in iter_raw_stories(folder.parent, split)]
    assert "One more." in stories


def test_stories_are_not_replaced_by_themselves(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    folder = download_data(data_args(tmp_path, source, validation_fraction=0.5))
    before = (folder / "train.parquet").read_bytes()
    with pytest.raises(UserError, match=r"data\.data_dir .* must lie apart from data\.source"):
        download_data(data_args(tmp_path, folder, validation_fraction=0.5))
    assert (folder / "train.parquet").read_bytes() == before


def test_downloaded_stories_are_used_after_the_source_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = data_args(tmp_path, write_jsonl(tmp_path / "a.jsonl", STORIES), validation_fraction=0.5)
    download_data(args)
    (tmp_path / "a.jsonl").unlink()
    download_data(args)
    assert "a.jsonl no longer exists; using the stories downloaded from it earlier" in caplog.text


def test_killed_download_leaves_no_final_files(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", [f"story {number}" for number in range(100)])
    args = data_args(tmp_path, source)
    program = """
import sys, time
from pathlib import Path
from tinystories_slm.config import DataArgs
from tinystories_slm.data.sources import file_formats
from tinystories_slm.data import raw_stories

def read_forever(path, text_column):
    print("reading", flush=True)
    while True:
        time.sleep(0.0001)
        yield "One more sentence of an endless file. " * 1000

file_formats.READERS[".txt"] = read_forever
raw_stories.download_data(DataArgs(source=sys.argv[1], data_dir=Path(sys.argv[2])))
"""
    command = [sys.executable, "-c", program, str(source), str(args.data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        time.sleep(0.5)
        process.kill()
    assert (args.data_dir / "raw.progress" / "segment-00000.partial" / "train.parquet").stat().st_size > 0
    assert not (args.data_dir / "raw").exists()
    assert RawManifest.load(download_data(args) / "source.json").splits["train"]["num_stories"] > 80
    assert {path.name for path in args.data_dir.iterdir()} == {".lock", "raw"}


def test_changed_file_is_not_read_from_a_cache(tmp_path: Path) -> None:
    assert load_split(write_jsonl(tmp_path / "a.jsonl", ["old"])) == ["old"]
    assert load_split(write_jsonl(tmp_path / "a.jsonl", ["new"])) == ["new"]


def test_revision_of_files_matches_sha256sum(tmp_path: Path) -> None:
    one = write_text(tmp_path / "a.txt", ["1"])
    write_text(tmp_path / "b.txt", ["2"])
    (tmp_path / "README.md").write_text("not a story")
    sums = subprocess.run(
        ["sha256sum", "a.txt", "b.txt"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    of_sums = subprocess.run(["sha256sum"], input=sums, capture_output=True, check=True).stdout
    assert resolve_revision(str(tmp_path)) == f"sha256:{of_sums.split()[0].decode()}"
    assert resolve_revision(str(one)) == f"sha256:{sums.split()[0].decode()}"


# ----------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Fake Hub with one dataset at one commit; the dict records the arguments of the last load."""
    loaded: dict[str, object] = {}

    def http_error(kind: type[Exception]) -> Exception:
        return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))

    def dataset_info(
        self: object, name: str, *, revision: str | None = None, timeout: float
    ) -> SimpleNamespace:
        if name != "someone/stories":
            raise http_error(RepositoryNotFoundError)
        if revision not in (None, "main"):
            raise http_error(RevisionNotFoundError)
        return SimpleNamespace(sha=SHA)

    def load_dataset(name: str, *, revision: str) -> datasets.DatasetDict:
        loaded.update(name=name, revision=revision)
        splits = {"train": [f"story {i}" for i in range(20)] + [None, " "], "validation": ["own"]}
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict({"story": texts, "n": [1] * len(texts)})
                for split, texts in splits.items()
            }
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield loaded


def test_hub_dataset_is_loaded_at_the_recorded_commit(tmp_path: Path, hub: dict[str, object]) -> None:
    args = data_args(tmp_path, "someone/stories", text_column="story", revision="main")
    manifest = RawManifest.load(download_data(args) / "source.json")
    assert hub == {"name": "someone/stories", "revision": SHA}
    provenance = manifest.provenance
    assert (provenance.revision, provenance.requested_revision) == (SHA, "main")
    assert manifest.splits["train"] == {
        "num_stories": 20,
        "num_bytes": sum(len(f"story {i}") for i in range(20)),
        "num_empty_dropped": 1,
        "num_null_dropped": 1,
    }
    for revision in (None, "main", SHA):  # all match the existing download; no Hub request
        download_data(data_args(tmp_path, "someone/stories", text_column="story", revision=revision))
    with pytest.raises(UserError, match=r"data\.revision \(v2\) is not a branch, tag or commit of"):
        download_data(data_args(tmp_path, "someone/stories", text_column="story", revision="v2"))


def test_commit_revision_needs_no_hub_request(
    hub: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(huggingface_hub.HfApi, "dataset_info")
    assert load_split("someone/stories", "validation", text_column="story", revision=SHA) == ["own"]


@pytest.mark.usefixtures("hub")
def test_hub_dataset_errors(tmp_path: Path) -> None:
    assert "neither an existing path nor a dataset on the Hub" in error_line(tmp_path, "no/such")
    assert "neither an existing path nor a dataset on the Hub" in error_line(tmp_path, "two words")
    assert "is not a branch, tag or commit of someone/stories" in error_line(
        tmp_path, "someone/stories", revision="v9"
    )
    assert "no column 'text', only 'story', 'n'" in error_line(tmp_path, "someone/stories")
    assert "column 'n' must contain strings, not int64" in error_line(
        tmp_path, "someone/stories", text_column="n"
    )


def test_error_when_the_hub_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset_info(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nwith a long trace")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    line = error_line(tmp_path, "someone/stories")
    assert (
        "not an existing path, and the Hub cannot be reached" in line and "Name or service not known" in line
    )


# ------------------------------------------------------------------------------------------------ errors


def test_path_errors(tmp_path: Path) -> None:
    for source in ("./none", "none.parquet", "/no/where", "~/none-of-it", "a/b/c", ""):
        assert "does not exist" in error_line(tmp_path, source)
    (tmp_path / "a.md").write_text("text\n")
    known = "must end in one of .parquet, .jsonl, .csv, .tsv, .json, .txt, or one of these in .gz"
    assert known in error_line(tmp_path, tmp_path / "a.md")
    (tmp_path / "folder").mkdir()
    assert "must contain a file that ends in" in error_line(tmp_path, tmp_path / "folder")
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    assert "data.revision (main) is only for datasets on the Hub" in error_line(
        tmp_path, source, revision="main"
    )


def test_source_and_data_dir_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [f"story {number}" for number in range(50)])
    (tmp_path / "link").symlink_to(folder)
    for source, data_dir, relation in (
        ("data/mine", "data/mine", "at or above"),
        ("link", "data/mine", "at or above"),
        ("data", "data/mine/deep", "at or above"),
        (".", "data/builtin", "at or above"),
        ("data/mine", "data", "below"),
        (str(folder / "a.jsonl"), "data/mine", "below"),
        ("data/mine/a.jsonl", "data/mine/a.jsonl", "at or above"),
    ):
        with pytest.raises(UserError) as error:
            download_data(DataArgs(source=source, data_dir=Path(data_dir)))
        assert f"data.data_dir ({data_dir}): must lie apart from data.source ({source})" in str(error.value)
        assert relation in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "data", "link", "mine"]
    args = DataArgs(source="data/mine", data_dir=Path("data/other"))
    assert download_data(args) == download_data(args)


def test_folder_name_is_unique_for_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "mine.txt": "mine.txt",
        "./mine.txt": "mine.txt",
        str(tmp_path / "mine.txt"): "mine.txt",
        "a/mine.txt": "a--mine.txt",
        "a/../b/it's mine.txt": "b--it's mine.txt",
        "data/mystories": "data--mystories",
        "roneneldan/TinyStories": "roneneldan--TinyStories",
        "/no/where/mine.txt": "no--where--mine.txt-b6c64000",
    }
    assert {source: folder_name(source) for source in names} == names
    for source in (".", "./builtin", "quickstart", "..", "/", "~", "~nobody", "\udcff"):
        assert folder_name(source) not in ("", ".", "..", "builtin", "quickstart")
    pairs = (("/no/where/mine.txt", "no/where/mine.txt"), ("a/b", "a--b"), (".", str(tmp_path.name)))
    pairs += (("sqlite:/a/x.db", "sqlite/a/x.db"), ("sqlite:x.db", "sqlite-x.db"))
    for one, other in pairs:
        assert folder_name(one) != folder_name(other)
    long = [folder_name("x/" * 100 + name) for name in ("a", "b")]
    assert long[0] != long[1] and max(map(len, long)) < 160


def test_file_errors_give_the_position(tmp_path: Path) -> None:
    def line(name: str, content: bytes, **options: object) -> str:
        (tmp_path / name).write_bytes(content)
        return error_line(tmp_path, tmp_path / name, **options)

    assert "a.txt has no <|endoftext|> between its stories" in line("a.txt", b"One.\n\nTwo.\n")
    assert "a.txt is not valid UTF-8 at byte 16 (0xff)" in line("a.txt", b"a<|endoftext|>bc\xff<|endoftext|>")
    assert "a.jsonl, line 2 is not valid JSON" in line("a.jsonl", b'{"text": "a"}\n{"text": \n')
    assert "a.jsonl is not valid UTF-8 at byte 24" in line("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert "line 1 is not a JSON object" in line("a.jsonl", b'[{"text": "a"}]')
    assert "line 1 has no key 'text', only 'story'; set data.text_column" in line(
        "a.jsonl", b'{"story": "a"}'
    )
    assert "line 1: 'text' must be a string, not int" in line("a.jsonl", b'{"text": 3}')
    assert "line 1 contains an unpaired surrogate (\\ud800)" in line("a.jsonl", b'{"text": "\\ud800"}')
    assert "cannot be read as parquet" in line("a.parquet", b"PAR1 not a parquet file PAR1")

    write_parquet(tmp_path / "b.parquet", STORIES, column="story")
    assert "no column 'text', only 'id', 'story'" in error_line(tmp_path, tmp_path / "b.parquet")
    assert "must contain strings, not int64" in error_line(tmp_path, tmp_path / "b.parquet", text_column="id")
    truncated = (tmp_path / "b.parquet").read_bytes()[:-20]
    assert "cannot be read as parquet" in line("c.parquet", truncated, text_column="story")


def test_split_errors(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"no split 'test', only 'train'"):
        load_stories(str(source), "test")
    with pytest.raises(UserError, match=r"no split 'validation', only 'train'"):
        load_stories(str(source), "validation", validation_split=None)
    assert "no split 'train', only 'validation'" in error_line(
        tmp_path, write_jsonl(tmp_path / "dev.jsonl", ["a"])
    )
    line = error_line(tmp_path, source, validation_fraction=0.0001)
    assert "has no validation stories (data.validation_fraction is 0.0001)" in line
    assert "has no train stories" in error_line(tmp_path, source, validation_fraction=0.9999)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no train stories" in error_line(tmp_path, tmp_path / "empty.jsonl")


def test_unwritable_data_dir_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"data\.data_dir .* cannot be written to"):
        download_data(DataArgs(data_dir=tmp_path / "file" / "data", max_stories=10))
    (tmp_path / "data" / "raw").mkdir(parents=True)
    with pytest.raises(UserError, match=r"raw exists, but this program did not complete it"):
        download_data(DataArgs(data_dir=tmp_path / "data", max_stories=10))


def test_load_splits_reads_a_folder_with_hub_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "stories" / "data"
    folder.mkdir(parents=True)
    for split, texts in (("train", ["One.", "Two."]), ("validation", ["Three."])):
        table = pa.table({"text": texts, "n": [1] * len(texts)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    splits = hub_module.load_splits(str(folder.parent), None, "text")

    assert {name: list(hub_module.iter_column(split, "text")) for name, split in splits.items()} == {
        "train": ["One.", "Two."],
        "validation": ["Three."],
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_memory_of_reading_parquet_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="none") as writer:
        for _ in range(60):  # of 2 MB, as published files have
            texts = [rng.bytes(1000).hex() for _ in range(1000)]
            writer.write_table(pa.table({"text": texts}))
    assert path.stat().st_size > 110e6
    measure = """
import sys
from pathlib import Path
from tinystories_slm.data.sources.file_formats import read_parquet

def rss_mb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

for number, _ in enumerate(read_parquet(Path(sys.argv[1]))):
    if number == 10_000:
        before = rss_mb()
print(rss_mb() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", measure, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert float(done.stdout) < 30

"""Datasets of a local Hub over HTTP: read as the same folder on disk is."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hub.conftest import hub_connection
from hub.loopback import File, LoopbackHub

from tinystories_slm.config import DataArgs
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.source_stories import load_stories
from tinystories_slm.data.sources import hub as hub_module
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.errors import UserError

PARAGRAPHS = [f"Tom saw {n} foxes.\n\nThey ran.\nTom ran, too." for n in range(40)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub


def publish(hub: LoopbackHub, folder: Path, name: str = "someone/stories") -> str:
    """Commit the files of a folder to a dataset, and return the commit."""
    repository = hub.create(name)
    files = {
        path.relative_to(folder).as_posix(): File(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    return repository.commit("files", repository.head.files | files).oid


def write_text(path: Path, stories: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")


def raw_stories(tmp_path: Path, source: str, name: str, subset: str | None = None) -> dict[str, list[str]]:
    args = DataArgs(source=source, subset=subset, data_dir=tmp_path / name)
    manifest = RawManifest.load(download_data(args) / "source.json")
    return {split: list(iter_raw_stories(args.data_dir, split)) for split in manifest.splits}


def test_text_files_of_a_hub_dataset_are_not_cut_into_lines(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    write_text(folder / "TinyStoriesV2-GPT4-train.txt", PARAGRAPHS)
    write_text(folder / "TinyStoriesV2-GPT4-valid.txt", PARAGRAPHS[:3])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Stories\n")
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    publish(hub, folder)
    on_hub = raw_stories(tmp_path, "someone/stories", "from hub")
    assert on_hub == {"train": PARAGRAPHS, "validation": PARAGRAPHS[:3]}
    assert on_hub == raw_stories(tmp_path, str(folder), "from disk")


def test_only_the_files_of_a_split_are_downloaded_and_then_read_offline(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    write_text(folder / "train.txt", PARAGRAPHS)
    write_text(folder / "valid.txt", PARAGRAPHS[:3])
    commit = publish(hub, folder)
    options = {"revision": commit, "validation_split": None}
    assert load_stories("someone/stories", "validation", **options)["text"][:] == PARAGRAPHS[:3]
    downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert downloads == [f"/datasets/someone/stories/resolve/{commit}/valid.txt"]
    hub.stop()
    assert load_stories("someone/stories", "validation", **options)["text"][:] == PARAGRAPHS[:3]


def test_default_configuration_of_the_card_selects_the_files(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    for config in ("long", "short"):
        for split in ("a", "b"):
            path = folder / config / f"{split}-00000.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": [f"{config} {split}"]}), path)
    entries = "".join(
        f"- config_name: {config}\n"
        f"  data_files:\n  - split: train\n    path: {config}/a-*\n"
        f"  - split: validation\n    path:\n    - '{config}/b-*.parquet'\n"
        for config in ("long", "short")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    publish(hub, folder)
    for source in ("someone/stories", str(folder)):
        with pytest.raises(UserError, match=r"has the configurations 'long', 'short' and no default"):
            raw_stories(tmp_path, source, "none")
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}  default: true\n---\n")
    publish(hub, folder, "someone/marked")
    expected = {"train": ["short a"], "validation": ["short b"]}
    assert raw_stories(tmp_path, "someone/marked", "from hub") == expected
    assert raw_stories(tmp_path, str(folder), "from disk") == expected


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="needs the cases in shared/cases")
def test_shared_folder_is_the_same_from_disk_and_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = SHARED / "cases" / "folder_with_json"
    publish(hub, folder)
    on_disk = raw_stories(tmp_path, str(folder), "disk")
    assert {split: len(stories) for split, stories in on_disk.items()} == {"train": 350, "validation": 50}
    assert raw_stories(tmp_path, "someone/stories", "hub") == on_disk


def write_configurations(folder: Path, *, default: str | None = None) -> None:
    """Write a dataset with the configurations `long` and `short`, each with both splits."""
    entries = []
    for config in ("long", "short"):
        for split in ("train", "validation"):
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": [f"{config} {split}"]}), path)
        marked = "  default: true\n" if config == default else ""
        files = "".join(
            f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in ("train", "validation")
        )
        entries.append(f"- config_name: {config}\n{marked}  data_files:\n{files}")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n")


def test_subset_selects_a_configuration_on_disk_and_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    write_configurations(folder)
    commit = publish(hub, folder)
    several = r"has the configurations 'long', 'short' and no default; set data\.subset to one of these$"
    for source in (str(folder), "someone/stories"):
        name = f"data of {Path(source).name}"
        with pytest.raises(UserError, match=several):
            raw_stories(tmp_path, source, name)
        missing = r"^data\.subset \(tall\): must be a configuration of .*, one of 'long', 'short'; use one"
        with pytest.raises(UserError, match=missing):
            raw_stories(tmp_path, source, name, subset="tall")
        assert raw_stories(tmp_path, source, name, subset="short") == {
            "train": ["short train"],
            "validation": ["short validation"],
        }
        manifest = tmp_path / name / "raw" / "source.json"
        assert RawManifest.load(manifest).provenance.subset == "short"
        assert raw_stories(tmp_path, source, name, subset="long")["validation"] == ["long validation"]
        raw_stories(tmp_path, source, name, subset="short")
        assert load_stories(source, "validation", subset="long")["text"][:] == ["long validation"]
        # A manifest of an earlier version has no subset.
        values = json.loads(manifest.read_text())
        del values["subset"], values["parts"]
        manifest.write_text(json.dumps(values))
        assert RawManifest.load(manifest).provenance.subset is None
    long, short = (find_source(str(folder), name).resolve_revision(None) for name in ("long", "short"))
    assert long != short  # of the files of each
    assert find_source("someone/stories", "short").num_download_bytes(commit, ["train"]) == (
        (folder / "short" / "train.parquet").stat().st_size
    )
    names = {find_source("someone/stories", name).folder_name() for name in (None, "long", "short")}
    assert len(names) == 3


def test_subset_of_a_source_without_configurations_is_rejected(hub: LoopbackHub, tmp_path: Path) -> None:
    write_text(tmp_path / "disk" / "train.txt", PARAGRAPHS)
    publish(hub, tmp_path / "disk")
    for source in (str(tmp_path / "disk"), str(tmp_path / "disk" / "train.txt"), "someone/stories"):
        with pytest.raises(UserError, match=r"data\.subset \(a\): .* has no configurations in its README.md"):
            raw_stories(tmp_path, source, "data", subset="a")
    for source in ("builtin", "tinystories"):
        with pytest.raises(UserError, match=rf"data\.subset \(a\) is only for .* \({source}\) is neither"):
            raw_stories(tmp_path, source, "data", subset="a")


def test_configurations_of_a_dataset_that_only_datasets_reads(hub: LoopbackHub, tmp_path: Path) -> None:
    del hub
    text = "Config name is missing.\nPlease pick one among the available configs: ['de', 'en']\nExample"
    line = str(hub_module._load_error("a/b", "0" * 40, ValueError(text)))
    assert line == (
        "data.source (a/b) has the configurations 'de', 'en' and no default; set data.subset to one of these"
    )


def test_csv_files_of_a_hub_dataset_are_streamed(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    for split, rows in (("train", PARAGRAPHS), ("validation", PARAGRAPHS[:3])):
        quoted = "".join(f'{number},"{row}"\r\n' for number, row in enumerate(rows))
        (folder / f"{split}.csv").write_bytes(b"\xef\xbb\xbfid,text\r\n" + quoted.encode())
    publish(hub, folder)
    assert raw_stories(tmp_path, "someone/stories", "hub") == {
        "train": PARAGRAPHS,
        "validation": PARAGRAPHS[:3],
    }

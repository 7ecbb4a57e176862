"""Datasets of a local Hub over HTTP: read as the same folder on disk is."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hub.conftest import hub_connection
from hub.loopback import File, LoopbackHub

from tinystories_slm.config import DataArgs
from tinystories_slm.data.sources import RawManifest, download_data, iter_raw_stories, load_stories
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


def raw_stories(tmp_path: Path, source: str, name: str) -> dict[str, list[str]]:
    args = DataArgs(source=source, data_dir=tmp_path / name)
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

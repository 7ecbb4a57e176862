"""A killed preparation continues: it repeats less than a segment of work, and its files are the same."""

import json
import math
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from killed_preparation import (
    SEGMENT,
    SMALL,
    count_work,
    file_bytes,
    prepare_until_killed,
    stop_start,
    use_small_segments,
)
from story_files import write_jsonl, write_text

from tinystories_slm.config import DataArgs
from tinystories_slm.data.prepare import merge_shards, prepare_data, prepare_shard
from tinystories_slm.data.raw_stories import download_data
from tinystories_slm.data.token_shards import Shard
from tinystories_slm.errors import UserError

WORDS = [f"word{number}" for number in range(900)] + ["the", "and", "was"] * 300


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_segments(monkeypatch)


def random_stories(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=40)) + "." for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> DataArgs:
    """130 training stories in three files, with repeats, faults and nulls, and 20 validation stories."""
    rng, validation = random.Random(0), random_stories(20, 1)
    stories: list[str | None] = [*random_stories(90, 2), *validation[:8]]
    stories += stories[:12]
    stories += ["Too short.", "  ", None, "“Quoted” " + random_stories(1, 3)[0]] * 5
    rng.shuffle(stories)
    source = tmp_path / "stories"
    source.mkdir()
    for number in range(3):
        write_jsonl(source / f"train-{number}.jsonl", stories[number * 44 : (number + 1) * 44])
    write_jsonl(source / "validation.jsonl", validation)
    return DataArgs(
        source=str(source), data_dir=tmp_path / "data", cleaning=True, deduplicate=True, num_workers=1
    )


def prepare_undisturbed(data: DataArgs) -> tuple[dict[str, bytes], Counter[str]]:
    """Prepare `data` in another folder; return its files and its work."""
    data = replace(data, data_dir=data.data_dir.with_name("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        work = count_work(patch, {})
        prepare_data(data, SMALL)
    return file_bytes(data.data_dir), work


def continue_preparation(data: DataArgs) -> Counter[str]:
    with pytest.MonkeyPatch.context() as patch:
        work = count_work(patch, {})
        prepare_data(data, SMALL)
    return work


@pytest.mark.parametrize(
    ("kind", "repeated"),
    [
        ("cleaned", {"cleaned": 15, "compared": 115, "hashed": 115, "encoded": 27}),
        ("compared", {"compared": 15, "hashed": 115, "encoded": 27}),
        ("hashed", {"hashed": 15, "encoded": 27}),
        ("encoded", {"encoded": 2}),
    ],
)
def test_step_killed_near_its_end_does_the_rest(folder: DataArgs, kind: str, repeated: object) -> None:
    expected, work = prepare_undisturbed(folder)
    assert work == {"cleaned": 140, "compared": 115, "hashed": 115, "encoded": 27}
    prepare_until_killed(folder, **{kind: math.ceil(0.9 * work[kind])})
    assert continue_preparation(folder) == repeated
    assert file_bytes(folder.data_dir) == expected  # and nothing of the stopped start is left


@pytest.mark.parametrize(
    "changed",
    [{"max_stories": 90}, {"deduplicate": False}, {"cleaning": False}, {"validation_split": "holdout"}],
)
def test_changed_option_reuses_nothing(folder: DataArgs, changed: dict[str, object]) -> None:
    prepare_until_killed(folder, hashed=100)
    data = replace(folder, validation_fraction=0.2, **changed)
    expected, work = prepare_undisturbed(data)
    assert continue_preparation(data) == work
    assert file_bytes(data.data_dir) == expected


def test_changed_source_reuses_nothing(folder: DataArgs) -> None:
    prepare_until_killed(folder, cleaned=100)
    write_jsonl(Path(folder.source) / "train-3.jsonl", random_stories(5, 9))
    expected, work = prepare_undisturbed(folder)
    assert continue_preparation(folder) == work
    assert file_bytes(folder.data_dir) == expected


def test_results_of_other_versions_are_not_reused(folder: DataArgs) -> None:
    _, work = prepare_undisturbed(folder)
    prepare_until_killed(folder, cleaned=100)
    options = folder.data_dir / "raw.progress" / "options.json"
    options.write_text(options.read_text().replace('"rensa": "', '"rensa": "0.'))
    assert continue_preparation(folder) == work


def text_source(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "stories.txt", random_stories(70, 4)))


def mixed_source(tmp_path: Path) -> str:
    """A file whose validation stories are held out, and a folder with its own, which ends first."""
    (tmp_path / "own").mkdir()
    for name, count in (("train-0", 11), ("train-1", 10), ("valid", 13)):
        write_jsonl(tmp_path / "own" / f"{name}.jsonl", random_stories(count, count))
    parts = [{"name": text_source(tmp_path), "weight": 2}, {"name": str(tmp_path / "own"), "weight": 1}]
    return json.dumps(parts)


@pytest.mark.parametrize("make_source", [text_source, mixed_source])
@pytest.mark.parametrize("max_stories", [None, 40])
def test_reading_continues_from_any_segment(tmp_path: Path, make_source, max_stories) -> None:
    data = DataArgs(
        source=make_source(tmp_path),
        data_dir=tmp_path / "undisturbed",
        validation_fraction=0.3,
        max_stories=max_stories,
        cleaning=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        total = count_work(patch, {})
        expected = file_bytes(download_data(data))
    for stop_at in range(5, total["cleaned"], SEGMENT):
        data = replace(data, data_dir=tmp_path / str(stop_at))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            count_work(patch, {"cleaned": stop_at}, stop_start)
            download_data(data)
        with pytest.MonkeyPatch.context() as patch:
            again = count_work(patch, {})
            assert file_bytes(download_data(data)) == expected
        assert again["cleaned"] == total["cleaned"] - (stop_at - 5)


def test_every_start_may_be_killed(folder: DataArgs) -> None:
    expected, _ = prepare_undisturbed(folder)
    starts = 0
    while not (folder.data_dir / "manifest.json").exists():
        with pytest.MonkeyPatch.context() as patch:
            count_work(patch, {"cleaned": 25, "compared": 25, "hashed": 25, "encoded": 5}, stop_start)
            try:
                prepare_data(folder, SMALL)
            except KeyboardInterrupt:
                starts += 1
    assert starts > 10 and file_bytes(folder.data_dir) == expected


def test_error_leaves_nothing(folder: DataArgs) -> None:
    with (Path(folder.source) / "train-2.jsonl").open("a") as file:
        file.write("not JSON")
    with pytest.raises(UserError, match=r"train-2\.jsonl, line 43 is not valid JSON"):
        prepare_data(folder, SMALL)
    assert [path.name for path in folder.data_dir.iterdir()] == [".lock"]


def test_results_of_a_stopped_change_are_removed(folder: DataArgs) -> None:
    prepare_data(folder, SMALL)
    expected = file_bytes(folder.data_dir)
    prepare_until_killed(replace(folder, max_stories=90), cleaned=60)
    assert (folder.data_dir / "raw.progress" / "segment-00003" / "state.json").exists()
    prepare_data(folder, SMALL)
    assert file_bytes(folder.data_dir) == expected


def test_two_preparations_continue_one(folder: DataArgs) -> None:
    expected, _ = prepare_undisturbed(folder)
    prepare_until_killed(folder, hashed=100)
    with pytest.MonkeyPatch.context() as patch:
        again = count_work(patch, {})
        workers = [threading.Thread(target=prepare_data, args=(folder, SMALL)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert again == {"hashed": 15, "encoded": 27}
    assert file_bytes(folder.data_dir) == expected


def test_killed_shard_continues(folder: DataArgs) -> None:
    expected, _ = prepare_undisturbed(folder)
    shards = [Shard(rank, 2) for rank in range(2)]
    prepare_shard(folder, SMALL, shards[0])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_work(patch, {"encoded": 9}, stop_start)
        prepare_shard(folder, SMALL, shards[1])
    with pytest.MonkeyPatch.context() as patch:
        again = count_work(patch, {})
        prepare_shard(folder, SMALL, shards[1])
    assert again == {"encoded": 14 - 8}
    merge_shards(folder, SMALL, 2)
    assert file_bytes(folder.data_dir) == expected

"""Named sets: each is read from a Hub of exactly the published shape, at the pinned commit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.conftest import hub_connection
from hub.loopback import File, LoopbackHub
from published_sets import TRAIN, VALID, parquet, publish, publish_tinystories, text

from tinystories_slm.commands import run
from tinystories_slm.config import DataArgs
from tinystories_slm.data.instruct import InstructBlock, parse_block
from tinystories_slm.data.raw_stories import RawManifest, download_data, iter_raw_stories
from tinystories_slm.data.source_stories import load_stories
from tinystories_slm.data.sources.named_sets import NAMED_SETS, suggest_name
from tinystories_slm.data.sources.registry import find_recorded_source, find_source
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import TrainingData

BLOCK = "Features: Dialogue\nWords: quit, oak, gloomy\nSummary: They quit.\nStory: \n\nSara and Ben ran."


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub


def downloaded(tmp_path: Path, name: str, **options: object) -> tuple[RawManifest, dict[str, list[str]]]:
    options = {"cleaning": False, "deduplicate": False} | options  # the stories here are short and alike
    args = DataArgs(source=name, data_dir=tmp_path / name, **options)
    manifest = RawManifest.load(download_data(args) / "source.json")
    return manifest, {split: list(iter_raw_stories(args.data_dir, split)) for split in manifest.splits}


def test_sets_of_tinystories_select_their_files_at_the_pinned_commit(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    publish_tinystories(hub)
    manifest, stories = downloaded(tmp_path, "tinystories")
    assert stories == {"train": TRAIN, "validation": VALID}
    assert manifest.provenance.revision == NAMED_SETS["tinystories"].revision
    _, stories = downloaded(tmp_path, "tinystories-v2")
    assert stories == {
        "train": [f"V2 {story}" for story in TRAIN],
        "validation": [f"V2 {story}" for story in VALID],
    }
    manifest, stories = downloaded(tmp_path, "tinystories-all")
    assert stories == {
        "train": [f"shard {shard}, {n}" for shard in range(1, 11) for n in range(5)],
        "validation": [f"shard 0, {n}" for n in range(5)],
    }
    assert [counts["num_stories"] for counts in manifest.splits.values()] == [50, 5]
    assert not [path for _, path in hub.requests if "TinyStories-train.txt" in path or ".npy" in path]
    files = hub.repositories["roneneldan/TinyStories"].commits[NAMED_SETS["tinystories"].revision].files
    size = len(files["TinyStories_all_data.tar.gz"].data)
    assert find_source("tinystories-all").num_download_bytes(None, ["train", "validation"]) == size

    hub.stop()  # everything is in the cache
    assert load_stories("tinystories-v2", "validation")["text"][0] == f"V2 {VALID[0]}"
    with pytest.raises(UserError, match=r"data\.source \(tinystory-v2\) .*; did you mean tinystories-v2\?"):
        load_stories("tinystory-v2", "train")


def test_named_sets_are_cleaned_and_deduplicated_by_default(hub: LoopbackHub, tmp_path: Path) -> None:
    publish_tinystories(hub)
    manifest, _ = downloaded(tmp_path, "tinystories", cleaning=None, deduplicate=None)
    assert manifest.provenance.cleaning and manifest.provenance.deduplicated
    assert manifest.duplicates is not None and manifest.cleaning_counts is not None


def test_clean_set_has_the_fixed_rows_of_its_card(hub: LoopbackHub, tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(20_030)]
    named = NAMED_SETS["tinystories-clean"]
    publish(hub, named.repository, named.revision, {"tinystories_gpt4_clean.parquet": parquet(text=rows)})
    _, stories = downloaded(tmp_path, "tinystories-clean")
    assert stories == {"train": rows[20_000:], "validation": rows[10_000:20_000]}
    assert load_stories("tinystories-clean", "test")["text"][:] == rows[:10_000]


def test_simplestories_has_its_column_and_a_holdout(hub: LoopbackHub, tmp_path: Path) -> None:
    named = NAMED_SETS["simplestories"]
    files = {
        f"data/train-0000{number}-of-00007.parquet": parquet(
            story=[f"{number} {story}" for story in TRAIN], topic=["a"] * 40, word_count=[7] * 40
        )
        for number in range(7)
    }
    files["data/test-00000-of-00001.parquet"] = parquet(story=["tested"], topic=["a"], word_count=[1])
    files["processed.parquet"] = parquet(story=["a copy"])
    publish(hub, named.repository, named.revision, files)
    manifest, stories = downloaded(tmp_path, "simplestories")
    assert sorted(stories["train"] + stories["validation"]) == sorted(
        f"{number} {story}" for number in range(7) for story in TRAIN
    )
    assert 0 < len(stories["validation"]) < 40
    assert manifest.provenance.text_column == "text"  # the default stands for the column of the set
    with pytest.raises(UserError, match=r"has no column 'title', only 'story', 'topic', 'word_count'"):
        load_stories("simplestories", "train", text_column="title")


def test_instruct_set_is_blocks_of_text(hub: LoopbackHub, tmp_path: Path) -> None:
    named = NAMED_SETS["tinystories-instruct"]
    files = {
        "TinyStories-Instruct-train.txt": text([BLOCK, BLOCK + " They sat."]),
        "TinyStories-Instruct-valid.txt": text([BLOCK + " The end."]),
        "readme.md": b"A dataset.\n",
    }
    publish(hub, named.repository, named.revision, files)
    _, stories = downloaded(tmp_path, "tinystories-instruct")
    assert stories == {"train": [BLOCK, BLOCK + " They sat."], "validation": [BLOCK + " The end."]}
    assert [parse_block(story) for story in stories["train"]] == [
        InstructBlock(
            words=("quit", "oak", "gloomy"), features=("Dialogue",), summary="They quit.", story=story
        )
        for story in ("Sara and Ben ran.", "Sara and Ben ran. They sat.")
    ]


def test_another_revision_replaces_the_pinned_one(hub: LoopbackHub, tmp_path: Path) -> None:
    publish_tinystories(hub)
    repository = hub.repositories["roneneldan/TinyStories"]
    newer = {"data/train-00000-of-00001.parquet": File(parquet(text=["new"]))}
    commit = repository.commit("newer", newer | {"data/validation-0.parquet": File(parquet(text=["own"]))})
    manifest, stories = downloaded(tmp_path, "tinystories", revision="main")
    assert (manifest.provenance.revision, manifest.provenance.requested_revision) == (commit.oid, "main")
    assert stories == {"train": ["new"], "validation": ["own"]}
    expected = (
        rf"roneneldan/TinyStories at {commit.oid} has no file TinyStoriesV2-GPT4-train.txt; remove data"
    )
    with pytest.raises(UserError, match=expected):
        load_stories("tinystories-v2", "train", revision="main")


def test_a_hub_id_that_does_not_exist_is_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    for name, hint in (("someone/none", ""), ("tiny/stories", "; did you mean tinystories?")):
        with pytest.raises(UserError) as error:
            download_data(DataArgs(source=name, data_dir=tmp_path / "data"))
        assert str(error.value) == (
            f"data.source ({name}) is neither an existing path nor a dataset on the Hub that you can read; "
            f"correct it, or log in with `hf auth login` if it is private{hint}"
        )
        assert not (tmp_path / "data" / "raw").exists()


def test_list_prints_each_set_and_downloads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run("download_data", ["--list"])
    printed = capsys.readouterr().out
    for name, named in NAMED_SETS.items():
        block = next(block for block in printed.split("\n\n") if block.startswith(f"{name}\n"))
        for fact in (named.repository, named.revision, named.text_column, named.citation, named.split_rule):
            assert fact in block
        assert (named.license or "not stated on its page") in block
    assert suggest_name("TinyStories") == "; did you mean tinystories?"
    assert suggest_name("someone/stories") == ""


def test_facts_of_a_named_set_come_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinystories").mkdir()
    commit = NAMED_SETS["tinystories"].revision
    source = find_recorded_source("tinystories-v2", commit)
    assert (source.dataset_id, source.public_name()) == ("roneneldan/TinyStories", "tinystories-v2")
    assert source.folder_name() == "tinystories-v2" and "CDLA" in source.license
    # A folder of this name is another source, with other folders.
    assert find_source("tinystories").folder_name() != find_source("./tinystories").folder_name()

    record = TrainingData(
        source="tinystories",
        revision=commit,
        validation_split="auto",
        validation_fraction=0.05,
        max_stories=None,
    )
    assert record.is_from("tinystories", "0" * 40)  # another commit of the same set
    assert record.is_from("roneneldan/TinyStories", commit)  # the same files
    assert not record.is_from("tinystories-v2", commit)  # other files of the same commit

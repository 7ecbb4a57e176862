"""Mixtures: order and counts are a function of the parts, and each part has its own validation stories."""

import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story_files import write_jsonl

from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import DataArgs, RunConfig, load_config, parse_config, save_config
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.provenance import Provenance
from tinystories_slm.data.raw_stories import RawManifest, check_apart, download_data, iter_raw_stories
from tinystories_slm.data.source_stories import in_validation, load_stories, resolve_revision
from tinystories_slm.data.sources.mixture import MixedSplits, MixtureSource
from tinystories_slm.data.sources.registry import find_recorded_source, find_source
from tinystories_slm.data.sources.story_source import Splits
from tinystories_slm.doctor.resources import check_data
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.evaluation.training_data import TrainingData, num_records_of_last_run
from tinystories_slm.hub.card import _source_link
from tinystories_slm.hub.published_run import redact_paths


def write_part(folder: Path, name: str, num_train: int, num_validation: int = 0) -> Path:
    """Write a folder with a validation split, or a file without one."""
    stories = [f"{name} {number}" for number in range(num_train)]
    if not num_validation:
        return write_jsonl(folder / f"{name}.jsonl", stories)
    (folder / name).mkdir()
    write_jsonl(folder / name / "train.jsonl", stories)
    write_jsonl(folder / name / "valid.jsonl", [f"{name} own {number}" for number in range(num_validation)])
    return folder / name


def mixture(*parts: tuple[Path | str, float]) -> str:
    return json.dumps([{"name": str(name), "weight": weight} for name, weight in parts])


def raw(
    tmp_path: Path, source: str, name: str, **options: object
) -> tuple[RawManifest, dict[str, list[str]]]:
    args = DataArgs(source=source, data_dir=tmp_path / name, **options)
    manifest = RawManifest.load(download_data(args) / "source.json")
    return manifest, {split: list(iter_raw_stories(args.data_dir, split)) for split in manifest.splits}


def test_stories_are_interleaved_by_weight_until_a_part_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    a, b = write_part(tmp_path, "a", 10, 2), write_part(tmp_path, "b", 2, 1)
    manifest, stories = raw(tmp_path, mixture((a, 3), (b, 1)), "data")
    expected = ["a 0", "a 1", "b 0", "a 2", "a 3", "a 4", "b 1", "a 5", "a 6", "a 7"]  # then b: no more
    assert stories == {"train": expected, "validation": ["a own 0", "a own 1", "b own 0"]}
    assert manifest.parts == [
        {
            "source": "a",
            "weight": 3,
            "revision": resolve_revision(str(a)),
            "num_train_stories": 8,
            "num_validation_stories": 2,
        },
        {
            "source": "b",
            "weight": 1,
            "revision": resolve_revision(str(b)),
            "num_train_stories": 2,
            "num_validation_stories": 1,
        },
    ]
    assert "the mixture ends where b has no more stories, with 8 of a, 2 of b" in caplog.text
    assert load_stories(mixture((a, 3), (b, 1)), "train")["text"][:] == expected
    assert load_stories(mixture((a, 3), (b, 1)), "validation")["text"][:] == stories["validation"]


def test_a_part_without_a_validation_split_holds_its_stories_out(tmp_path: Path) -> None:
    a, b = write_part(tmp_path, "a", 300), write_part(tmp_path, "b", 100, 4)
    options = {"validation_fraction": 0.2}
    manifest, stories = raw(tmp_path, mixture((a, 2), (b, 1)), "data", **options)
    held_out = [story for story in stories["validation"] if " own " not in story]
    assert held_out and all(story.startswith("a ") and in_validation(story, 0.2) for story in held_out)
    assert stories["validation"][-4:] == [f"b own {number}" for number in range(4)]
    assert not any(story.startswith("a ") and in_validation(story, 0.2) for story in stories["train"])
    for split, texts in stories.items():
        counted = Counter(story[0] for story in texts)
        assert {part["source"][0]: part[f"num_{split}_stories"] for part in manifest.parts} == counted
        assert manifest.splits[split]["num_stories"] == counted.total()
    num_train = Counter(story[0] for story in stories["train"])
    assert abs(num_train["a"] - 2 * num_train["b"]) <= 2

    # The same parts give the same stories again; the limit is on what is read, as without a mixture.
    assert raw(tmp_path, mixture((a, 2), (b, 1)), "again", **options)[1] == stories
    _, limited = raw(tmp_path, mixture((a, 2), (b, 1)), "limited", max_stories=30, **options)
    assert limited["train"] == stories["train"][: len(limited["train"])]
    assert len(limited["train"]) + len(limited["validation"]) == 30 + 4
    all_held_out = raw(tmp_path, mixture((a, 2), (b, 1)), "holdout", validation_split="holdout", **options)[1]
    assert {story[0] for story in all_held_out["validation"]} == {"a", "b"}
    assert not [story for story in all_held_out["validation"] if " own " in story]


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from([0.1, 0.5, 1, 2, 3, 7.25])), min_size=1, max_size=4
    )
)
def test_each_part_has_its_share_at_every_place(parts: list[tuple[int, float]]) -> None:
    value = mixture(*((f"part{index}.jsonl", weight) for index, (_, weight) in enumerate(parts)))
    source = MixtureSource(value)
    sizes = [size for size, _ in parts]
    opened = open_with_sizes(source, sizes)
    read = list(opened.iter_pairs(read_train, lambda splits: False, None))
    total = sum(Fraction(str(weight)) for _, weight in parts)
    for index, (size, weight) in enumerate(parts):
        share = Fraction(str(weight)) / total
        own = [story for _, story in read if story.startswith(f"{index} ")]
        assert own == [f"{index} {number}" for number in range(len(own))]  # in order, none twice
        assert len(own) == opened.part_counts()[index]["num_train_stories"] <= size
        num_own = accumulate(story.startswith(f"{index} ") for _, story in read)
        bound = (1 + len(parts) * share) / 2
        assert all(abs(count - (n + 1) * share) <= bound for n, count in enumerate(num_own))
    assert any(
        size == part["num_train_stories"] for size, part in zip(sizes, opened.part_counts(), strict=True)
    )


def read_train(splits: Splits, *_: str) -> Iterator[tuple[str, str]]:
    return (("train", story) for story in splits["train"]())


def open_with_sizes(source: MixtureSource, sizes: list[int]) -> MixedSplits:
    """Return the splits of the mixture, with parts in memory."""

    class Part:
        has_revisions = False

        def __init__(self, index: int) -> None:
            self.index = index

        def open_splits(self, *_: object) -> dict:
            return {"train": lambda: (f"{self.index} {number}" for number in range(sizes[self.index]))}

        def public_name(self) -> str:
            return str(self.index)

    class InMemory(MixtureSource):
        sources = [Part(index) for index in range(len(sizes))]

    return InMemory(source.value).open_splits(None, "text", None)


def test_a_list_in_yaml_is_the_same_as_a_flag(tmp_path: Path) -> None:
    text = '[{"name": "tinystories", "weight": 3}, {"name": "mine.jsonl", "weight": 1}]'
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  source:\n  - {name: tinystories, weight: 3.0}\n  - name: mine.jsonl\n")
    config = parse_config([f"--config={path}"])
    assert config.data.source == text
    assert parse_config(["--data.source", "[{name: tinystories, weight: 3}, {name: mine.jsonl}]"]) == config
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert DataArgs(source=[{"name": "a", "weight": 2}]).source == '[{"name": "a", "weight": 2}]'
    for value in ("[a].jsonl", "[a]", "[", "[]", "{name: a}"):
        assert DataArgs(source=value).source == value  # a path may look so
    for value, message in (
        ("[{name: a, weight: 0}]", "weight (0) of a must be a number above 0"),
        ("[{name: a, weight: .inf}]", "weight (inf) of a must be a number above 0"),
        ("[{name: a, weight: true}]", "weight (True) of a must be a number above 0"),
        ("[{weight: 2}]", "each part must have a name"),
        ("[{name: a, share: 2}]", "share is not an option of a part; use name, weight, subset, revision"),
        ("[{name: 3}]", "name (3) must be text; quote it"),
    ):
        with pytest.raises(UserError) as error:
            parse_config(["--data.source", value])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_of_a_part_name_it(tmp_path: Path) -> None:
    a = write_part(tmp_path, "a", 10)
    (tmp_path / "dev.jsonl").write_text('{"text": "b"}\n')
    for source, message in (
        (mixture((a, 1), (tmp_path / "none.jsonl", 1)), "none.jsonl') does not exist; correct the path"),
        (mixture((a, 1), (tmp_path / "dev.jsonl", 1)), "dev.jsonl has no split 'train', only 'validation'"),
        (f'[{{"name": "{a}", "revision": "main"}}]', "a.jsonl is only for datasets on the Hub; remove it"),
        (mixture((mixture((a, 1)), 1)), "a part cannot be a mixture; list its parts instead"),
    ):
        with pytest.raises(UserError) as error:
            download_data(DataArgs(source=source, data_dir=tmp_path / "data"))
        assert message in str(error.value)
    with pytest.raises(UserError, match=r"data\.revision \(main\) is only for datasets on the Hub"):
        download_data(DataArgs(source=mixture((a, 1)), data_dir=tmp_path / "data", revision="main"))
    with pytest.raises(UserError, match=r"data\.subset \(b\): cannot be set for a mixture; set subset of"):
        download_data(DataArgs(source=mixture((a, 1)), data_dir=tmp_path / "data", subset="b"))
    with pytest.raises(UserError, match=r"a mixture cannot be scored; set --data to one of its parts"):
        evaluate(EvaluateArgs(model="none", data=mixture((a, 1))))
    with pytest.raises(UserError, match=r"data\.data_dir .* must lie apart from data\.source"):
        check_apart(mixture(("builtin", 1), (a, 1)), "data.data_dir", tmp_path)


def test_a_changed_part_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = write_part(tmp_path, "a", 40), write_part(tmp_path, "b", 40)
    args = DataArgs(source=mixture((a, 1), (b, 1)), data_dir=tmp_path / "data")
    download_data(args)
    assert download_data(args) == tmp_path / "data" / "raw"
    write_part(tmp_path, "b", 41)
    assert "again" not in caplog.text
    download_data(args)
    assert "has changed from sha256:" in caplog.text
    b.unlink()
    download_data(args)  # the stories that were read earlier
    with pytest.raises(UserError, match=r"data\.source \(.*b\.jsonl'\) does not exist"):
        download_data(DataArgs(source=mixture((a, 1), (b, 2)), data_dir=tmp_path / "data"))
    assert download_data(args) == tmp_path / "data" / "raw"


def test_published_facts_of_a_mixture_have_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = write_part(tmp_path, "a", 10)
    commit = "f54c09fd" * 5
    value = DataArgs(source=mixture(("someone/stories", 3), (a, 1))).source
    revision = f"{commit} + {resolve_revision(str(a))}"
    source = find_recorded_source(value, revision)
    public = '[{"name": "someone/stories", "weight": 3}, {"name": "a.jsonl", "weight": 1}]'
    assert source.public_name() == public == find_recorded_source(public, revision).public_name()
    assert redact_paths({"source": value, "data": value}, revision) == {"source": public, "data": public}
    assert (list(source.dataset_ids), source.license) == (["someone/stories"], None)
    expected = "a mixture of `someone/stories` (weight 3) and `a.jsonl` (weight 1)"
    assert _source_link(public, revision) == expected
    assert find_source(value).needs_network and not find_source(mixture((a, 1))).needs_network
    folders = use_own_folders(RunConfig(data=DataArgs(source=value)))
    assert folders.data.data_dir.name.startswith("someone-stories+a.jsonl-")
    assert folders.data.data_dir.name == folders.output_dir.name
    local = RunConfig(data=DataArgs(source=mixture((a, 1)), data_dir=tmp_path / "data"))
    assert "will be created from `a.jsonl` (weight 1)" in next(check_data(local)).text

    provenance = Provenance.from_args(DataArgs(source=value), revision)
    records = TrainingData.of_run(provenance)
    assert [(data.source, data.revision) for data in records] == [
        ("someone/stories", commit),
        ("a.jsonl", resolve_revision(str(a))),
    ]
    assert num_records_of_last_run(records) == 2
    assert [data.is_from(str(a), resolve_revision(str(a))) for data in records] == [False, True]

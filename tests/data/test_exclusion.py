"""Excluded stories: nothing of them is read, and every other token stays in its place."""

import logging

import numpy as np
import pytest
import torch
from conftest import tiny_model

from tinystories_slm.config import parse_config
from tinystories_slm.data.exclusion import excluded_stories
from tinystories_slm.data.packing import IGNORED_LABEL, PACKINGS, PADDING
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.data.training_windows import open_windows
from tinystories_slm.errors import UserError
from tinystories_slm.inspection.run_data import RunData
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training import train

ANIMALS = ("fox", "hen", "cat", "dog", "owl", "pig", "cow", "ant", "bee", "elk", "rat")
SENTENCES = (
    "One day the {0} walked to the river and met a frog.",
    "The {0} baked a cake for {1} friends and burned it.",
    "Rain fell on the house of the {0} for {1} days.",
    "A {0} lost {1} hats and found them under a bed.",
    "In the evening the {0} sang about the moon.",
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Twelve stories, the last of which repeats the one of the pig but for a word."""
    folder = tmp_path_factory.mktemp("stories")
    texts = []
    for n, animal in enumerate(ANIMALS):
        order = np.random.default_rng(n).permutation(len(SENTENCES))
        texts.append(" ".join(SENTENCES[i].format(animal * (1 + k % 2), n) for k, i in enumerate(order[:3])))
    texts.append(texts[5] + " Then it slept.")
    (folder / "train.txt").write_text("\n<|endoftext|>\n".join(texts))
    (folder / "validation.txt").write_text("A mouse bought some cheese.\n<|endoftext|>\n")
    return folder


def config_of(stories, folder, *flags):
    return parse_config(
        [
            *(f"--data.source={stories}", f"--data.data_dir={folder}", "--data.seq_len=24", *flags),
            *("--tokenizer.vocab_size=300", "--train.seed=3", "--model.family=llama"),
        ]
    )


@pytest.mark.parametrize("masked", ["false", "true"], ids=["plain", "masked"])
@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_all_other_tokens_stay_in_their_place(packing, masked, stories, tmp_path):
    flags = (f"--data.packing={packing}", f"--data.mask_across_stories={masked}")
    config = config_of(stories, tmp_path, *flags)
    excluding = config_of(stories, tmp_path, *flags, "--data.exclude=story:2-3", "--data.exclude=story:7")
    manifest = prepare_data(config.data, config.tokenizer)
    with_all, without = open_windows(config, manifest), open_windows(excluding, manifest)
    assert len(with_all) == len(without)
    num_hidden = 0
    for step in range(3 * len(with_all) // 4):  # three epochs
        one, other = with_all.batch(step, 4), without.batch(step, 4)
        positions = with_all.positions(4 * step + np.arange(4))
        story = np.where(positions == PADDING, -1, np.searchsorted(with_all.document_ends, positions))
        hidden = np.isin(story, [2, 3, 7])
        assert np.array_equal(one.input_ids[~hidden], other.input_ids[~hidden])
        assert np.array_equal(one.labels[~hidden], other.labels[~hidden])
        assert (other.input_ids[hidden] == manifest.eos_token_id).all()
        assert (other.labels[hidden] == IGNORED_LABEL).all()
        if masked == "true":
            assert np.array_equal(one.position_ids[~hidden], other.position_ids[~hidden])
        num_hidden += hidden.sum()
    assert num_hidden > 0


def test_with_masks_an_excluded_story_changes_no_prediction_of_another(stories, tmp_path):
    flags = ("--data.packing=contiguous", "--data.mask_across_stories=true")
    config = config_of(stories, tmp_path, *flags)
    manifest = prepare_data(config.data, config.tokenizer)
    with_all = open_windows(config, manifest)
    without = open_windows(config_of(stories, tmp_path, *flags, "--data.exclude=story:4"), manifest)
    model = tiny_model(family="llama", vocab_size=300, max_position_embeddings=24)
    batches = [data.batch(0, len(data)) for data in (with_all, without)]
    hidden = without.is_excluded(with_all.positions(np.arange(len(with_all))))
    with torch.no_grad():
        one, other = (
            model(
                input_ids=torch.tensor(batch.input_ids),
                position_ids=torch.tensor(batch.position_ids),
                use_cache=False,  # as in training; with a cache there are no packed sequences
            ).logits
            for batch in batches
        )
    visible = torch.tensor(~hidden)
    assert hidden.any() and torch.allclose(one[visible], other[visible], atol=1e-5)
    assert not torch.allclose(one[~visible], other[~visible], atol=1e-2)


def test_rules_select_rows_clusters_and_patterns(stories, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = config_of(stories, tmp_path)
    num_stories = prepare_data(config.data, config.tokenizer).splits["train"]["num_stories"]
    assert num_stories == len(list(iter_raw_stories(tmp_path, "train"))) == 12

    def rows(*rules):
        data = config_of(stories, tmp_path, *(f"--data.exclude={rule}" for rule in rules)).data
        return np.flatnonzero(excluded_stories(data, num_stories)).tolist()

    assert rows("story:3", "story:8-10") == [3, 8, 9, 10]
    assert rows("cluster:5") == rows("cluster:11") == [5, 11]
    assert rows(r"pattern:\b(fox|hen)\b") == [0, 1]
    assert "data.exclude: 2 of 12 training stories are left out: rows 0, 1" in caplog.text
    assert excluded_stories(config.data, num_stories) is None

    for rule, message in (
        ("story:12", r"data.exclude \(12\): must be below 12"),
        ("cluster:99", r"data.exclude \(99\): must be below 12"),
        ("pattern:zebra", r"data.exclude \(pattern:zebra\): must occur in a training story"),
        ("story:0-11", "leaves no training story"),
    ):
        with pytest.raises(UserError, match=message):
            rows(rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("3", "3 must be story:12, story:100-199, cluster:12 or pattern:REGEX"),
        ("story:5-3", "story:5-3 must not end before it begins"),
        ("story:-1", "story:-1 must be story:12"),
        ("pattern:", "pattern: must be story:12"),
        ("pattern:(", r"pattern:\( must be a regular expression"),
        ("clusters:1", "clusters:1 must be"),
    ],
)
def test_a_wrong_rule_is_rejected(rule, message):
    with pytest.raises(UserError, match=f"data.exclude: {message}"):
        parse_config(["--data.exclude", rule])


def test_a_run_leaves_stories_out_and_keeps_the_data(tiny_run, data_dir):
    before = (data_dir / "manifest.json").read_bytes(), (data_dir / "train.bin").stat().st_mtime_ns
    plain = train(tiny_run("--train.max_steps=12", name="plain"))
    config = tiny_run("--data.exclude=story:0-99", "--data.exclude=story:150", name="without")
    run_dir = train(config)
    assert ((data_dir / "manifest.json").read_bytes(), (data_dir / "train.bin").stat().st_mtime_ns) == before
    run, whole = RunData.open(run_dir), RunData.open(plain)
    read, expected = (
        {part.story for step in range(1, 13) for parts in data.parts(step) for part in parts}
        for data in (run, whole)
    )
    hidden = {*range(100), 150}
    assert read == expected - hidden and expected & hidden
    lines = read_metrics(run_dir / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.isfinite(losses).all() and len(losses) == 12
    with pytest.raises(UserError, match=r"data\.exclude was"):
        train(tiny_run("--data.exclude=story:0", name="without"))
    assert Manifest.load(run_dir / "manifest.json").splits == Manifest.load(plain / "manifest.json").splits

"""Near duplicates and leaks: planted ones are found, others stay, and no validation story is repeated."""

import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import DataArgs
from tinystories_slm.data.filters import duplicates
from tinystories_slm.data.filters.duplicates import (
    LEAK_NGRAM,
    LEAK_SHARE,
    Leaks,
    NgramHasher,
    find_duplicates,
)
from tinystories_slm.data.raw_stories import RawManifest, download_data
from tinystories_slm.data.sources.file_formats import read_parquet

VOCABULARY = [f"word{number}" for number in range(3000)]


def random_stories(count: int, seed: int = 0, num_words: int = 120) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=num_words)) + "." for _ in range(count)]


def duplicate_of(story: str, share: float, rng: random.Random) -> str:
    """Replace a share of the words."""
    words = story.split(" ")
    for index in rng.sample(range(len(words)), round(len(words) * share)):
        words[index] = rng.choice(["red", "big", "garden", "ball"])
    return " ".join(words)


def shares(validation: str, training: str) -> float:
    """Share of the distinct 8-grams of one story that another contains, by plain sets."""
    grams = [
        {tuple(words[i : i + LEAK_NGRAM]) for i in range(max(len(words) - LEAK_NGRAM + 1, 1))}
        for words in (duplicates._WORD.findall(text.lower()) for text in (validation, training))
    ]
    return len(grams[0] & grams[1]) / len(grams[0])


def test_planted_duplicates_are_found_and_no_others():
    stories, rng = random_stories(1500), random.Random(1)
    for share, least in ((0.0, 1.0), (0.05, 1.0), (0.1, 0.95), (0.15, 0.6)):
        mixed = stories + [duplicate_of(story, share, rng) for story in stories[:200]]
        repeated = find_duplicates(mixed, len(mixed))
        assert not repeated.is_duplicate[:1500].any()  # precision 1: random stories are unrelated
        assert (repeated.first[1500:] == np.arange(200)).mean() >= least
        assert repeated.is_exact[1500:].all() == (share == 0)
    assert find_duplicates(iter(mixed), len(mixed)).first.tolist() == repeated.first.tolist()


def test_duplicates_of_short_and_empty_stories():
    texts = ["", "A!", "a", "!!", "!!", "a b", "a b c"]
    assert find_duplicates(texts, len(texts)).first.tolist() == [0, 1, 1, 0, 0, 5, 6]
    assert find_duplicates([], 0).is_duplicate.tolist() == []


@given(st.lists(st.lists(st.sampled_from("abcdé"), max_size=6).map(" ".join), max_size=8), st.integers(1, 4))
def test_hashes_are_those_of_the_grams(stories, size):
    hashes, starts = NgramHasher(size).hash_stories(stories)
    grams = [
        [tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))]
        for words in (story.split() for story in stories)
    ]
    assert starts.tolist() == np.concatenate([[0], np.cumsum([len(story) for story in grams])]).tolist()
    flat = [gram for story in grams for gram in story]
    assert len(set(zip(flat, hashes.tolist(), strict=True))) == len(set(flat)) == len(set(hashes.tolist()))


@given(st.integers(0, 2**32), st.sampled_from([0, 3, 64]))
def test_leaks_are_those_of_a_plain_search(seed, max_common):
    rng = random.Random(seed)
    phrase = " ".join(rng.choices(VOCABULARY, k=30))  # in every story
    validation = [f"{phrase} {story}" for story in random_stories(6, seed, rng.choice([3, 40, 200]))]
    training = random_stories(6, seed + 1, 60)
    training += [duplicate_of(rng.choice(validation), rng.uniform(0, 0.6), rng) for _ in range(12)]
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_MAX_COMMON", max_common)
        leaks = Leaks(iter(validation))
        found = leaks.check(training)
    expected = np.array([[shares(one, other) > LEAK_SHARE for one in validation] for other in training])
    assert (found >= 0).tolist() == expected.any(axis=1).tolist()
    assert leaks.leaked.tolist() == expected.any(axis=0).tolist()
    assert all(expected[index, target] for index, target in enumerate(found) if target >= 0)


def test_download_drops_duplicates_and_leaks_and_says_which(tmp_path):
    stories, rng = random_stories(300), random.Random(2)
    validation = random_stories(40, seed=7)
    repeated = [*stories[:10], *(duplicate_of(story, 0.05, rng) for story in stories[10:40])]
    leaks = [duplicate_of(story, 0.08, rng) for story in validation[:15]]
    source = tmp_path / "stories"
    source.mkdir()
    for name, texts in (("train", [*stories, *repeated, *leaks]), ("validation", validation)):
        (source / f"{name}.txt").write_text("<|endoftext|>".join(texts))
    data = {"source": str(source), "deduplicate": True}
    raw = download_data(DataArgs(data_dir=tmp_path / "data", **data))
    manifest = RawManifest.load(raw / "source.json")
    found = {name: value for name, value in manifest.duplicates.items() if name.startswith("num_")}
    assert found == {"num_exact": 10, "num_near": 30, "num_leaks": 15, "num_validation_leaked": 15}
    kept = list(read_parquet(raw / "train.parquet"))
    assert kept == stories and list(read_parquet(raw / "validation.parquet")) == validation
    assert manifest.splits["train"]["num_stories"] == 300
    assert manifest.splits["train"]["num_bytes"] == sum(map(len, stories))
    assert max(shares(one, other) for one in validation for other in kept) <= LEAK_SHARE
    rows = pq.read_table(raw / "dropped.parquet").to_pylist()
    assert [row["text"] for row in rows] == repeated + leaks
    assert [row["row"] for row in rows] == [*range(40), *range(15)]
    assert [row["rule"] for row in rows] == ["exact_duplicate"] * 10 + ["near_duplicate"] * 30 + ["leak"] * 15

    again = download_data(DataArgs(data_dir=tmp_path / "again", **data))
    assert (again / "train.parquet").read_bytes() == (raw / "train.parquet").read_bytes()


def test_duplicates_fall_on_one_side_of_a_holdout(tmp_path):
    """Each story has a near duplicate: by the text alone, most of those of validation are in training."""
    stories, rng = random_stories(400), random.Random(3)
    source = tmp_path / "stories.txt"
    source.write_text("<|endoftext|>".join(stories + [duplicate_of(story, 0.04, rng) for story in stories]))
    sides = {}
    for deduplicate in (False, True):
        options = {"deduplicate": deduplicate, "validation_fraction": 0.1}
        raw = download_data(DataArgs(source=str(source), data_dir=tmp_path / str(deduplicate), **options))
        splits = [list(read_parquet(raw / f"{split}.parquet")) for split in ("train", "validation")]
        leaks = Leaks(splits[1])
        leaks.check(splits[0])
        sides[deduplicate] = leaks.leaked.mean()
    assert sides[False] > 0.8 and sides[True] == 0


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the stories in shared/data")
def test_real_stories_are_no_duplicates_and_do_not_leak():
    folder = SHARED / "data" / "tinystories"
    training, validation = (
        list(read_parquet(folder / f"{split}-00000-of-00001.parquet")) for split in ("train", "validation")
    )
    assert not find_duplicates(training, len(training)).is_duplicate.any()
    leaks = Leaks(validation)
    assert (leaks.check(training[:5000]) == -1).all() and not leaks.leaked.any()

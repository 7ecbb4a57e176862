"""Memorization: planted copies are found with their exact length, as by comparing every pair of stories."""

import random

import pytest

from tinystories_slm import grammar
from tinystories_slm.report_card import memorization
from tinystories_slm.report_card.memorization import find_copies
from tinystories_slm.report_card.text import split_words


def longest_run(words: list[str], others: list[str]) -> int:
    """Words of the longest common run, by dynamic programming."""
    best, row = 0, [0] * (len(others) + 1)
    for word in words:
        previous, row = row, [0] * (len(others) + 1)
        for at, other in enumerate(others):
            if word == other:
                row[at + 1] = previous[at] + 1
                best = max(best, row[at + 1])
    return best


def rouge_l(words: list[str], others: list[str]) -> float:
    row = [0] * (len(others) + 1)
    for word in words:
        previous, row = row, [0]
        for at, other in enumerate(others):
            row.append(previous[at] + 1 if word == other else max(previous[at + 1], row[at]))
    return 2 * row[-1] / (len(words) + len(others))


def test_planted_copies_are_found(monkeypatch):
    monkeypatch.setattr(memorization, "_BLOCK_STORIES", 7)
    training = list(grammar.generate_corpus(30, seed=5))
    words = split_words(training[17])
    run = words[20:61]
    queries = [
        training[3],
        "zebra quantum " + " ".join(run) + " zebra",
        "zebra, quantum!",
        "",
        "Once",
        training[9].upper().replace(".", "!"),
    ]
    copies, num_read = find_copies(queries, iter(training))
    assert num_read == 30
    assert [copy.run for copy in copies] == [
        len(split_words(training[3])), 41, 0, 0, 1, len(split_words(training[9])),
    ]  # fmt: skip
    assert copies[1].run_words == tuple(run) and copies[1].run_story == training[17]
    assert [copies[i].run_share for i in (0, 3, 5)] == [1.0, 0.0, 1.0]
    assert copies[0].rouge_l == copies[5].rouge_l == 1.0 and copies[0].nearest_story == training[3]
    assert copies[2].rouge_l == copies[3].rouge_l == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_runs_and_rouge_are_those_of_every_pair(seed, monkeypatch):
    monkeypatch.setattr(memorization, "_BLOCK_STORIES", 4)
    rng = random.Random(seed)
    training = [" ".join(rng.choices("abcd", k=rng.randrange(40))) for _ in range(11)]
    queries = [" ".join(rng.choices("abcde", k=rng.randrange(30))) for _ in range(6)]
    copies, _ = find_copies(queries, training)
    for query, copy in zip(queries, copies, strict=True):
        words, others = query.split(), [story.split() for story in training]
        assert copy.run == max(longest_run(words, other) for other in others)
        assert " ".join(copy.run_words) in query and " ".join(copy.run_words) in copy.run_story
        expected = max((rouge_l(words, other) for other in others if words), default=0.0)
        assert copy.rouge_l == pytest.approx(expected, abs=1e-6)


def test_no_training_story_leaves_nothing_to_find():
    [copy], num_read = find_copies(["a b c"], [])
    assert (copy.run, copy.rouge_l, num_read) == (0, 0.0, 0)

"""Measures of stories: planted faults change exactly their measure, and short stories have no value."""

import math

import numpy as np
import pytest

from tinystories_slm.report_card.estimates import estimate_difference, estimate_mean
from tinystories_slm.report_card.measures import GROUP_SIZE, MEASURES, CardStory

BY_NAME = {measure.name: measure for measure in MEASURES}
PLAIN = (
    'Once there was a girl named Lily. She found a red ball. "Look!" said Lily. '
    "Her mom was happy. They played in the garden until the sun went down."
)


def mean_of(name: str, *texts: str) -> float:
    values = BY_NAME[name].values([CardStory(text) for text in texts])
    return float(values.mean()) if len(values) else math.nan


@pytest.mark.parametrize(
    ("name", "planted", "before", "after"),
    [
        ("repetition", PLAIN + " She found a red ball.", 0, 2 / 31),
        ("repeated_sentence", PLAIN + " She found a red ball.", 0, 1),
        ("unknown_words", PLAIN.replace("found", "fownd"), 0, 1 / 27),
        ("quotations_closed", PLAIN.replace('!" said', "! said"), 1, 0),
        ("hero_returns", PLAIN.replace("said Lily", "said Mia"), 1, 0),
        ("late_name", PLAIN.replace("the sun", "old Bob"), 0, 1),
        ("dialogue", PLAIN.replace('"', ""), 1, 0),
    ],
)
def test_planted_fault_changes_its_measure(name, planted, before, after):
    assert mean_of(name, PLAIN) == before
    assert mean_of(name, planted) == pytest.approx(after, abs=0.004)


def test_diversity_is_one_for_different_words_and_falls_with_copies():
    letters = "abcdefghij"
    different = [" ".join(letter * n for n in range(1, 9)) for letter in letters]
    assert mean_of("distinct_1", *different) == mean_of("distinct_3", *different) == 1.0
    assert mean_of("distinct_1", *different[:1] * GROUP_SIZE) == 1 / GROUP_SIZE
    assert mean_of("self_bleu", *different[:1] * GROUP_SIZE) == pytest.approx(1.0)
    assert mean_of("self_bleu", *different) < 0.1
    assert math.isnan(mean_of("distinct_1", *different[:9]))  # less than a group


@pytest.mark.parametrize("text", ["", "...", "Once", "3 4 5"])
def test_story_without_words_or_of_one_word_has_values_only_where_they_are_defined(text):
    stories = [CardStory(text)] * GROUP_SIZE
    values = {measure.name: measure.values(stories) for measure in MEASURES}
    assert all(np.isfinite(found).all() for found in values.values())
    assert values["words"].tolist() == [float(text == "Once")] * GROUP_SIZE
    assert len(values["repetition"]) == len(values["quotations_closed"]) == 0
    assert len(values["readability"]) == (GROUP_SIZE if text == "Once" else 0)


def test_each_measure_is_defined_in_one_sentence():
    for measure in MEASURES:
        assert measure.definition.endswith(".") and ". " not in measure.definition
        assert (measure.of_story is None) != (measure.of_group is None)


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    mean = estimate_mean(values)
    half = 1.96 * values.std() / 20
    assert mean.value == values.mean() and mean.count == 400
    assert mean.high - mean.value == pytest.approx(half, rel=0.15)
    assert mean.value - mean.low == pytest.approx(half, rel=0.15)
    difference = estimate_difference(values, values - 1.0)
    assert difference.value == pytest.approx(1.0) and difference.low > 0.6 and difference.high < 1.4
    assert estimate_mean(values[:0]) is estimate_difference(values, values[:0]) is None

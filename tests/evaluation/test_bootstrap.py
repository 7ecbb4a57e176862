"""Bootstrap intervals: as wide as theory says, paired, and the same for every run."""

import numpy as np
import pytest

from tinystories_slm.evaluation import bootstrap
from tinystories_slm.evaluation.bootstrap import Resamples, percentile_interval


def test_interval_of_a_mean_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = percentile_interval(Resamples(400).ratios(values, np.ones(400)))
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_covers_the_true_ratio_as_often_as_it_states():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        tokens = rng.integers(50, 400, size=80)
        nats = tokens * rng.normal(1.5, 0.3, size=80)
        low, high = percentile_interval(Resamples(80, num_resamples=300).ratios(nats, tokens))
        covered += low < 1.5 < high
    assert 178 <= covered <= 200  # 190 expected; 178 are 4 standard deviations below


def test_difference_of_two_models_is_paired():
    rng = np.random.default_rng(3)
    size = np.full(300, 800)
    first = rng.normal(900, 200, size=300)
    other = first - rng.normal(20, 5, size=300)  # a better model, on every story
    resamples = Resamples(300)
    low, high = percentile_interval(resamples.ratios(other - first, size))
    assert low < -20 / 800 < high < 0 and high - low < 0.002
    own = percentile_interval(resamples.ratios(first, size))
    assert own[1] - own[0] > 20 * (high - low)
    assert percentile_interval(resamples.ratios(first - first, size)) == [0.0, 0.0]


def test_draws_depend_on_the_seed_alone(monkeypatch):
    values = np.arange(50.0)
    sums = Resamples(50, num_resamples=40).sums(values)
    assert np.array_equal(Resamples(50, num_resamples=40).sums(values), sums)
    assert not np.array_equal(Resamples(50, num_resamples=40, seed=1).sums(values), sums)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS", 50 * 7)  # 7 resamples at a time
    assert np.array_equal(Resamples(50, num_resamples=40).sums(values), sums)


def test_interval_without_two_defined_samples_is_none():
    assert percentile_interval([1.0, np.nan]) is None
    assert np.isnan(Resamples(2, num_resamples=50).ratios(np.array([1.0, 0.0]), np.array([1, 0]))).any()

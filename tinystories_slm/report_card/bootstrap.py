"""Bootstrap intervals: the mean of independent values, and the difference of two means."""

from dataclasses import dataclass

import numpy as np

_NUM_RESAMPLES = 2000
_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% percentile interval, resampled over stories or groups of stories."""

    value: float
    low: float
    high: float
    count: int
    """Number of values."""


def estimate_mean(values: np.ndarray) -> Estimate | None:
    """Return the mean of `values` (N,) with its interval; None without values."""
    if not len(values):
        return None
    low, high = np.percentile(_resampled_means(values, seed=0), _LEVELS)
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def estimate_difference(values: np.ndarray, others: np.ndarray) -> Estimate | None:
    """Return mean(`values`) - mean(`others`) of two independent samples; None if one has no values."""
    if not len(values) or not len(others):
        return None
    means = _resampled_means(values, seed=0) - _resampled_means(others, seed=1)
    low, high = np.percentile(means, _LEVELS)
    return Estimate(float(values.mean() - others.mean()), float(low), float(high), len(values))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return values[rng.integers(len(values), size=(_NUM_RESAMPLES, len(values)))].mean(axis=1)

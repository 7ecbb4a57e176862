"""Means with bootstrap intervals: of independent values, and of the difference of two samples."""

from dataclasses import dataclass

import numpy as np

from tinystories_slm.evaluation.bootstrap import Resamples, percentile_interval


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
    low, high = percentile_interval(_resampled_means(values, seed=0))
    return Estimate(float(values.mean()), low, high, len(values))


def estimate_difference(values: np.ndarray, others: np.ndarray) -> Estimate | None:
    """Return mean(`values`) - mean(`others`) of two independent samples; None if one has no values."""
    if not len(values) or not len(others):
        return None
    means = _resampled_means(values, seed=0) - _resampled_means(others, seed=1)
    low, high = percentile_interval(means)
    return Estimate(float(values.mean() - others.mean()), low, high, len(values))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    return Resamples(len(values), seed=seed).ratios(values, np.ones(len(values)))

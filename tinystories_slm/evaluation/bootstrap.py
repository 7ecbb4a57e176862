"""Confidence intervals of scores over stories, by the bootstrap.

A resample draws N of the N stories with replacement. A score is a ratio of two sums over stories, and the
resampled score is the same ratio over the drawn stories. The interval holds the middle 95 % of the resampled
scores: the percentile interval of Efron and Tibshirani (An Introduction to the Bootstrap, 1993, chapter 13).
Two models are resampled with the same draws, so that the interval of their difference is that of paired
scores (Koehn 2004, https://aclanthology.org/W04-3250). A seed determines the draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
SEED = 0
_MAX_DRAWS = 2**22  # numbers in memory at the same time: 32 MiB

Interval = list[float]
"""Lower and upper bound."""


@dataclass(frozen=True)
class Resamples:
    """Draws of `num_stories` stories: `num_resamples` times, determined by `seed`."""

    num_stories: int
    num_resamples: int = NUM_RESAMPLES
    seed: int = SEED

    def sums(self, *columns: np.ndarray) -> np.ndarray:
        """Return the sums of each column, of shape (N,), over the drawn stories: (columns, resamples)."""
        values = np.stack(columns, axis=1).astype(np.float64)  # (N, columns)
        rng = np.random.default_rng(self.seed)
        uniform = np.full(self.num_stories, 1 / self.num_stories)
        rows = max(1, _MAX_DRAWS // self.num_stories)
        sums = [
            rng.multinomial(self.num_stories, uniform, size=min(rows, self.num_resamples - first)) @ values
            for first in range(0, self.num_resamples, rows)
        ]
        return np.concatenate(sums).T

    def ratios(self, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        """Return sum(numerator) / sum(denominator) over each draw: (resamples,)."""
        upper, lower = self.sums(numerator, denominator)
        return np.divide(upper, lower, out=np.full_like(upper, np.nan), where=lower > 0)


def percentile_interval(samples: Sequence[float] | np.ndarray) -> Interval | None:
    """Return the interval with the middle `CONFIDENCE` of `samples`; None if fewer than two are defined."""
    defined = np.asarray(samples)[np.isfinite(samples)]
    if len(defined) < 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(defined, [tail, 1 - tail])]

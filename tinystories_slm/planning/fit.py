"""Fit of a law to measured runs: its check on held-out runs, the worth of repetitions, other vocabularies."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinystories_slm.planning.law import effective_tokens
from tinystories_slm.planning.measured_runs import MeasuredRun, known_entropy
from tinystories_slm.power_law import Estimated, PowerLaw, UndeterminedLawError, fit_power_law

# The second reading of a story is worth about as much as the first (0.97 of it at R* = 15.4, Muennighoff et
# al., arXiv 2305.16264), so that these runs need no R*.
_MAX_EPOCHS = 2.05
_MIN_REPEATED = 2
_REPETITION_GRID = np.geomspace(0.5, 500.0, 150)


@dataclass(frozen=True)
class HeldOutRun:
    """A run that the law did not see, and what it predicted."""

    run: MeasuredRun
    predicted: Estimated

    @property
    def error(self) -> float:
        """Predicted minus reached, relative to the reached loss."""
        return self.predicted.value / self.run.bits_per_byte - 1


@dataclass(frozen=True)
class HeldOutCheck:
    """Predictions of a law that was fitted to the smaller runs alone."""

    fitted: Sequence[MeasuredRun]
    runs: Sequence[HeldOutRun]
    """Larger runs, the smallest budget first."""

    @property
    def root_mean_square(self) -> float:
        """Root mean square of the relative errors."""
        return math.sqrt(statistics.fmean(one.error**2 for one in self.runs))


@dataclass(frozen=True)
class ScalingFit:
    """A law, and what the runs say beside it."""

    law: PowerLaw
    runs: Sequence[MeasuredRun]
    """Runs that the law was fitted to: one vocabulary, no story read more than about twice."""
    check: HeldOutCheck | None
    check_reason: str | None
    """Why there is no check; None if there is one."""
    repetition: Estimated | None
    """R* of `effective_tokens`; None without runs that repeat their stories."""
    num_repeated: int
    vocabularies: dict[int, list[float]]
    """Of runs with another vocabulary: reached loss, as a multiple of the law's at an equal size and text."""


def fit_scaling(runs: Sequence[MeasuredRun], held_out_factor: float, *, seed: int = 0) -> ScalingFit:
    """Fit the law of the most frequent vocabulary.

    The largest runs are predicted by a law of the others, up to `held_out_factor` times the largest budget of
    these; the law that is returned is fitted to all.

    Raises:
        UndeterminedLawError: the runs do not determine a law of size and tokens.
    """
    irreducible = known_entropy(runs)
    [(vocab_size, _)] = Counter(run.vocab_size for run in runs).most_common(1)
    own = [run for run in runs if run.vocab_size == vocab_size]
    fitted = [run for run in own if run.num_epochs <= _MAX_EPOCHS]
    repeated = [run for run in own if run.num_epochs > _MAX_EPOCHS]
    law = _fit(fitted, irreducible, seed)
    try:
        check, reason = _check(fitted, irreducible, held_out_factor, seed), None
    except UndeterminedLawError as error:
        check, reason = None, str(error)
    bytes_per_token = statistics.fmean(run.bytes_per_token for run in fitted)
    others: dict[int, list[float]] = {}
    for run in runs:
        if run.vocab_size != vocab_size and run.num_epochs <= _MAX_EPOCHS:
            tokens = run.num_tokens * run.bytes_per_token / bytes_per_token
            expected = law.predict(parameters=run.num_parameters, tokens=tokens).value
            others.setdefault(run.vocab_size, []).append(run.bits_per_byte / expected)
    return ScalingFit(
        law=law,
        runs=fitted,
        check=check,
        check_reason=reason,
        repetition=_fit_repetition(law, repeated, seed) if len(repeated) >= _MIN_REPEATED else None,
        num_repeated=len(repeated),
        vocabularies=dict(sorted(others.items())),
    )


def _fit(runs: Sequence[MeasuredRun], irreducible: float | None, seed: int) -> PowerLaw:
    law = fit_power_law(
        [run.num_parameters for run in runs],
        [run.num_tokens for run in runs],
        [run.bits_per_byte for run in runs],
        irreducible=irreducible,
        needs_bounds=False,
        seed=seed,
    )
    if len(law.terms) < 2:
        raise UndeterminedLawError(f"only {law.terms[0]} vary; size and tokens must both vary")
    return law


def _check(
    runs: Sequence[MeasuredRun], irreducible: float | None, held_out_factor: float, seed: int
) -> HeldOutCheck:
    largest = max(run.budget for run in runs)
    limit = min(run.budget for run in runs if held_out_factor * run.budget >= largest)
    if limit == largest:
        raise UndeterminedLawError(
            f"the largest run has over {held_out_factor:g} times the budget of the others"
        )
    smaller = [run for run in runs if run.budget <= limit]
    law = _fit(smaller, irreducible, seed)
    larger = sorted((run for run in runs if run.budget > limit), key=lambda run: run.budget)
    predictions = [law.predict(parameters=run.num_parameters, tokens=run.num_tokens) for run in larger]
    return HeldOutCheck(smaller, [HeldOutRun(*pair) for pair in zip(larger, predictions, strict=True)])


def _fit_repetition(law: PowerLaw, runs: Sequence[MeasuredRun], seed: int) -> Estimated:
    """Return the R* with the smallest relative errors, under the law and under each of its resamples."""
    noise = law.noise * np.random.default_rng(seed).standard_normal((len(runs), len(law.noise)))
    noise[:, 0] = 0.0
    squares = np.zeros((len(_REPETITION_GRID), len(law.noise)))
    for run, own_noise in zip(runs, noise, strict=True):
        reached = run.bits_per_byte * np.exp(own_noise)
        for index, epochs in enumerate(_REPETITION_GRID):
            tokens = effective_tokens(run.num_tokens, run.unique_tokens, epochs)
            expected = law.expected_losses(parameters=run.num_parameters, tokens=tokens)
            squares[index] += (expected / reached - 1) ** 2
    return Estimated.of(_REPETITION_GRID[squares.argmin(axis=0)])

"""Power law of the loss over parameters N and tokens D, with intervals: L = E + A / N^alpha + B / D^beta.

The form is that of Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, section 3.3); without the last
term it is a law over parameters alone, as in Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361). E, A and
B are not negative. The fit is least squares of the relative errors, so that a run near E counts as much as
one far above it; Hoffmann et al. fit logarithms for the same reason. For given exponents it is linear, so
that only the exponents are searched for (variable projection, Golub and Pereyra 1973).

Intervals are from a parametric bootstrap: losses are drawn around the fitted law and fitted again. Each draw
takes its noise from the distribution of the noise that fits the residuals (chi-squared with runs minus
parameters degrees of freedom). Where the law is close to linear in its parameters, these intervals are those
of Student's t. They assume independent relative noise of one size, and that the law holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

MIN_LEVELS = 4
"""Different values that a term needs: three determine its curve, and one more shows whether it fits. One
fewer if E is known."""
SYMBOLS = {"parameters": ("A", "N", "alpha"), "tokens": ("B", "D", "beta")}
"""Factor, quantity and exponent of each term in the formula."""
CONFIDENCE = 0.95
NUM_RESAMPLES = 500
_EXPONENTS = (0.01, 4.0)
"""Bounds of the search."""
_SAME = 1.05
"""Values within this ratio count as one: a run that ends by the clock has its own number of tokens."""
_ZOOMS = 5


class UndeterminedLawError(ValueError):
    """The runs do not determine a power law; the message is one sentence."""


@dataclass(frozen=True)
class Estimated:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Estimated":
        """Return the first value, that of the fit, with the interval of the others, the resamples."""
        return cls(float(samples[0]), *_bounds(samples[1:]))

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law; `fit_power_law` returns it."""

    terms: tuple[str, ...]
    """What varies, in order: `parameters`, `tokens`."""
    scales: np.ndarray
    """Geometric mean of the values of each term, (terms,); the law is computed in multiples of it."""
    exponents: np.ndarray
    """(1 + resamples, terms); the first row is the fit."""
    coefficients: np.ndarray
    """E, and the part of the loss that each term has at its scale: (1 + resamples, 1 + terms)."""
    noise: np.ndarray
    """Relative standard deviation of a run's loss around the law, (1 + resamples,)."""
    num_runs: int

    @property
    def irreducible(self) -> Estimated:
        """E, the loss without limits of size and data."""
        return Estimated.of(self.coefficients[:, 0])

    @property
    def unbounded_terms(self) -> list[str]:
        """Terms whose exponent's interval ends where the search ends: the runs do not determine it."""
        low, high = _EXPONENTS
        bounds = {term: self.exponent(term) for term in self.terms}
        return [term for term, one in bounds.items() if one.low <= low * 1.01 or one.high >= high / 1.01]

    def exponent(self, term: str) -> Estimated:
        """Return alpha (`parameters`) or beta (`tokens`)."""
        return Estimated.of(self.exponents[:, self.terms.index(term)])

    def factor(self, term: str) -> Estimated:
        """Return A (`parameters`) or B (`tokens`), which is in units of the loss times N^alpha or D^beta."""
        index = self.terms.index(term)
        scale = self.scales[index] ** self.exponents[:, index]
        return Estimated.of(self.coefficients[:, 1 + index] * scale)

    def describe(self) -> str:
        """Return the form of the law and its constants with their intervals, as a line of text."""
        formula = " + ".join(["E", *("{} / {}^{}".format(*SYMBOLS[term]) for term in self.terms)])
        values = [f"E = {self.irreducible}"]
        for term in self.terms:
            factor, _, exponent = SYMBOLS[term]
            values += [f"{exponent} = {self.exponent(term)}", f"{factor} = {self.factor(term)}"]
        return (
            f"L = {formula}, {self.num_runs} runs; {'; '.join(values)}; relative standard deviation of a run "
            f"{self.noise[0]:.2%}"
        )

    def record(self) -> dict[str, Any]:
        """Return the constants with their intervals as JSON types."""
        return {
            "num_runs": self.num_runs,
            "irreducible": asdict(self.irreducible),
            "terms": {
                term: {"factor": asdict(self.factor(term)), "exponent": asdict(self.exponent(term))}
                for term in self.terms
            },
            "relative_error": float(self.noise[0]),
        }

    def predict(self, *, parameters: float | None = None, tokens: float | None = None) -> Estimated:
        """Return the loss that a new run is expected to have, with the interval that holds such a run.

        Far outside the fitted range the interval holds only if the law does.

        Raises:
            ValueError: the value of a term is missing.
        """
        mean = self.expected_losses(parameters=parameters, tokens=tokens)
        drawn = mean * np.exp(self.noise * np.random.default_rng(0).standard_normal(len(mean)))
        return Estimated(float(mean[0]), *_bounds(drawn[1:]))

    def expected_losses(self, *, parameters: float | None = None, tokens: float | None = None) -> np.ndarray:
        """Return the loss under the fit and under each resample, without noise: (1 + resamples,)."""
        given = {"parameters": parameters, "tokens": tokens}
        if missing := [term for term in self.terms if given[term] is None]:
            raise ValueError(f"{missing[0]}: must be set; the law depends on it")
        values = np.array([given[term] for term in self.terms], dtype=float)
        powers = (values / self.scales) ** -self.exponents
        return self.coefficients[:, 0] + (self.coefficients[:, 1:] * powers).sum(axis=1)


def fit_power_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    irreducible: float | None = None,
    needs_bounds: bool = True,
    seed: int = 0,
) -> PowerLaw:
    """Fit the law to runs with these numbers of parameters and tokens; `seed` determines the resamples.

    `irreducible` is E if it is known, as the entropy of the built-in corpus is. A number that is nearly the
    same in all runs has no term: its part of the loss is in E, or in the other term if E is known. Without
    `needs_bounds` an interval may end where the search ends; the law then holds among its runs alone.

    Raises:
        UndeterminedLawError: too few runs or sizes, no trend, an exponent without bounds although
            `needs_bounds`, or a run below the known E.
    """
    observed = np.asarray(losses, dtype=float)
    values = {"parameters": np.asarray(parameters, float), "tokens": np.asarray(tokens, float)}
    terms = tuple(name for name, numbers in values.items() if _num_levels(numbers) > 1)
    _check_runs(terms, values, observed, irreducible)
    numbers = np.stack([values[term] for term in terms], axis=1)  # (runs, terms)
    scales = np.exp(np.log(numbers).mean(axis=0))
    ratios = numbers / scales
    exponents, coefficients, squares = _fit(ratios, observed[None], irreducible)
    freedom = len(observed) - _num_fitted(terms, irreducible)
    rng = np.random.default_rng(seed)
    noise = np.sqrt(squares[0] / rng.chisquare(freedom, NUM_RESAMPLES))
    fitted = coefficients[0, 0] + (coefficients[0, 1:] * ratios ** -exponents[0]).sum(axis=1)
    drawn = fitted * np.exp(noise[:, None] * rng.standard_normal((NUM_RESAMPLES, len(observed))))
    more_exponents, more_coefficients, _ = _fit(ratios, drawn, irreducible)
    law = PowerLaw(
        terms=terms,
        scales=scales,
        exponents=np.concatenate([exponents, more_exponents]),
        coefficients=np.concatenate([coefficients, more_coefficients]),
        noise=np.concatenate([[np.sqrt(squares[0] / freedom)], noise]),
        num_runs=len(observed),
    )
    _check_trends(law)
    if needs_bounds and law.unbounded_terms:
        term = law.unbounded_terms[0]
        low, high = law.exponent(term).low, law.exponent(term).high
        raise UndeterminedLawError(f"the exponent of {term} has no bounds: from {low:.2g} to {high:.2g}")
    return law


def _num_levels(values: np.ndarray) -> int:
    """Return how many different values there are; those within a ratio of `_SAME` count once."""
    levels: list[float] = []
    for value in np.sort(values):
        if not levels or value > levels[-1] * _SAME:
            levels.append(value)
    return len(levels)


def _num_fitted(terms: Sequence[str], irreducible: float | None) -> int:
    """Return how many numbers of the law are fitted."""
    return 2 * len(terms) + (irreducible is None)


def _check_runs(
    terms: Sequence[str], values: dict[str, np.ndarray], losses: np.ndarray, irreducible: float | None
) -> None:
    if not terms:
        raise UndeterminedLawError("all runs have the same size and the same number of tokens")
    if irreducible is not None and losses.min() <= irreducible:
        raise UndeterminedLawError(
            f"a loss of {losses.min():.4g} is not above the known E, {irreducible:.4g}"
        )
    min_levels = MIN_LEVELS - (irreducible is not None)
    for term in terms:
        if (levels := _num_levels(values[term])) < min_levels:
            what = "sizes" if term == "parameters" else "numbers of tokens"
            raise UndeterminedLawError(f"{levels} different {what}; a fit needs at least {min_levels}")
    needed = _num_fitted(terms, irreducible) + 1
    if len(losses) < needed:
        raise UndeterminedLawError(f"{len(losses)} runs; a fit of {needed - 1} numbers needs {needed}")
    if len(terms) == 2:
        correlation = np.corrcoef(np.log(values["parameters"]), np.log(values["tokens"]))[0, 1]
        if abs(correlation) > 0.95:
            raise UndeterminedLawError(
                f"tokens depend on the size (correlation {correlation:.2f} of their logarithms), so that "
                "their effects cannot be separated"
            )


def _check_trends(law: PowerLaw) -> None:
    for index, term in enumerate(law.terms):
        if law.coefficients[0, 1 + index] <= 0:
            raise UndeterminedLawError(f"the loss does not fall with more {term}")


def _fit(
    ratios: np.ndarray, losses: np.ndarray, irreducible: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return exponents (rows, terms), coefficients (rows, 1 + terms) and, for each row, the sum of squares of
    the relative errors.

    `ratios` is (runs, terms) and `losses` (rows, runs). The search starts with a grid over all exponents and
    continues with finer grids around the best point.
    """
    num_terms = ratios.shape[1]
    num_points = 41 if num_terms == 1 else 13
    low, high = np.log(_EXPONENTS)
    center = np.full((len(losses), num_terms), (low + high) / 2)
    width = (high - low) / 2
    unit = np.array(list(product(np.linspace(-1, 1, num_points), repeat=num_terms)))  # (points, terms)
    for _ in range(_ZOOMS):
        points = np.clip(center[:, None] + width * unit, low, high)  # (rows, points, terms)
        coefficients, squares = _fit_linear(ratios, losses, np.exp(points), irreducible)
        best = squares.argmin(axis=1)
        rows = np.arange(len(losses))
        center = points[rows, best]
        # Two steps of the grid to each side: in two dimensions the valley is not along the axes.
        width *= 4 / (num_points - 1)
    return np.exp(center), coefficients[rows, best], squares[rows, best]


def _fit_linear(
    ratios: np.ndarray, losses: np.ndarray, exponents: np.ndarray, irreducible: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best coefficients, none negative, and the sum of squares for each row and point.

    `exponents` is (rows, points, terms). With three coefficients at most, every choice of those that are not
    zero is solved, and the best one without a negative coefficient is kept. A known E is no coefficient: it
    is subtracted before, and is the first of the result.
    """
    columns = ratios ** -exponents[..., None, :]  # (rows, points, runs, terms)
    if irreducible is None:
        columns = np.concatenate([np.ones((*columns.shape[:-1], 1)), columns], axis=-1)
    columns = columns / losses[:, None, :, None]
    parts = 1 - (irreducible or 0.0) / losses  # of the loss that the columns have to make up, (rows, runs)
    products = np.einsum("...ri,...rj->...ij", columns, columns)
    targets = np.einsum("...ri,...r->...i", columns, np.broadcast_to(parts[:, None], columns.shape[:-1]))
    total = (parts**2).sum(axis=1)[:, None]
    best = np.zeros(targets.shape)
    least = np.broadcast_to(total, targets.shape[:-1]).copy()
    for chosen in _subsets(columns.shape[-1]):
        matrix = products[..., chosen, :][..., chosen]
        matrix = matrix + 1e-13 * np.eye(len(chosen)) * np.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
        found = np.linalg.solve(matrix, targets[..., chosen, None])[..., 0]
        squares = total - (found * targets[..., chosen]).sum(axis=-1)
        is_better = (found >= 0).all(axis=-1) & (squares < least)
        least = np.where(is_better, squares, least)
        full = np.zeros(targets.shape)
        full[..., chosen] = found
        best = np.where(is_better[..., None], full, best)
    if irreducible is not None:
        best = np.concatenate([np.full((*best.shape[:-1], 1), irreducible), best], axis=-1)
    return best, np.maximum(least, 0)


def _subsets(size: int) -> Iterator[list[int]]:
    for mask in range(1, 2**size):
        yield [index for index in range(size) if mask >> index & 1]


def _bounds(samples: np.ndarray) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(samples, [tail, 1 - tail])]

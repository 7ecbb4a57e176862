"""Power law of the loss over parameters N and tokens D, with intervals: L = E + A / N^alpha + B / D^beta.

The form is that of Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, section 3.3); without the last
term it is a law over parameters alone, as in Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361). E, A and
B are not negative, and the fit is least squares of the losses. For given exponents it is linear, so that only
the exponents are searched for (variable projection, Golub and Pereyra 1973); this needs numpy alone.

Intervals are from a parametric bootstrap: losses are drawn around the fitted law and fitted again. Each draw
takes its noise from the distribution of the noise that fits the residuals (chi-squared with runs minus
parameters degrees of freedom). Where the law is close to linear in its parameters, these intervals are those
of Student's t. They assume independent noise of one size, and that the law holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

MIN_LEVELS = 4
"""Different values that a term needs: three determine its curve, and one more shows whether it fits."""
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
    """Standard deviation of a run's loss around the law, (1 + resamples,)."""
    num_runs: int

    @property
    def irreducible(self) -> Estimated:
        """E, the loss without limits of size and data."""
        return _estimate(self.coefficients[:, 0])

    def exponent(self, term: str) -> Estimated:
        """Return alpha (`parameters`) or beta (`tokens`)."""
        return _estimate(self.exponents[:, self.terms.index(term)])

    def factor(self, term: str) -> Estimated:
        """Return A (`parameters`) or B (`tokens`), which is in units of the loss times N^alpha or D^beta."""
        index = self.terms.index(term)
        scale = self.scales[index] ** self.exponents[:, index]
        return _estimate(self.coefficients[:, 1 + index] * scale)

    def predict(self, *, parameters: float | None = None, tokens: float | None = None) -> Estimated:
        """Return the loss that a new run is expected to have, with the interval that holds such a run.

        Far outside the fitted range the interval holds only if the law does.

        Raises:
            ValueError: the value of a term is missing.
        """
        mean = self.expected_losses(parameters=parameters, tokens=tokens)
        drawn = mean + self.noise * np.random.default_rng(0).standard_normal(len(mean))
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
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, seed: int = 0
) -> PowerLaw:
    """Fit the law to runs with these numbers of parameters and tokens; `seed` determines the resamples.

    A number that is nearly the same in all runs has no term: its part of the loss is in E.

    Raises:
        UndeterminedLawError: too few runs or sizes, no trend, or an exponent without bounds.
    """
    observed = np.asarray(losses, dtype=float)
    values = {"parameters": np.asarray(parameters, float), "tokens": np.asarray(tokens, float)}
    terms = tuple(name for name, numbers in values.items() if _num_levels(numbers) > 1)
    _check_runs(terms, values, observed)
    numbers = np.stack([values[term] for term in terms], axis=1)  # (runs, terms)
    scales = np.exp(np.log(numbers).mean(axis=0))
    ratios = numbers / scales
    exponents, coefficients, squares = _fit(ratios, observed[None])
    freedom = len(observed) - 1 - 2 * len(terms)
    rng = np.random.default_rng(seed)
    noise = np.sqrt(squares[0] / rng.chisquare(freedom, NUM_RESAMPLES))
    fitted = coefficients[0, 0] + (coefficients[0, 1:] * ratios ** -exponents[0]).sum(axis=1)
    drawn = fitted + noise[:, None] * rng.standard_normal((NUM_RESAMPLES, len(observed)))
    more_exponents, more_coefficients, _ = _fit(ratios, drawn)
    law = PowerLaw(
        terms=terms,
        scales=scales,
        exponents=np.concatenate([exponents, more_exponents]),
        coefficients=np.concatenate([coefficients, more_coefficients]),
        noise=np.concatenate([[np.sqrt(squares[0] / freedom)], noise]),
        num_runs=len(observed),
    )
    _check_bounds(law)
    return law


def _num_levels(values: np.ndarray) -> int:
    """Return how many different values there are; those within a ratio of `_SAME` count once."""
    levels: list[float] = []
    for value in np.sort(values):
        if not levels or value > levels[-1] * _SAME:
            levels.append(value)
    return len(levels)


def _check_runs(terms: Sequence[str], values: dict[str, np.ndarray], losses: np.ndarray) -> None:
    if not terms:
        raise UndeterminedLawError("all runs have the same size and the same number of tokens")
    for term in terms:
        if (levels := _num_levels(values[term])) < MIN_LEVELS:
            what = "sizes" if term == "parameters" else "numbers of tokens"
            raise UndeterminedLawError(f"{levels} different {what}; a fit needs at least {MIN_LEVELS}")
    needed = 2 + 2 * len(terms)
    if len(losses) < needed:
        raise UndeterminedLawError(f"{len(losses)} runs; a fit of {needed - 1} numbers needs {needed}")
    if len(terms) == 2:
        correlation = np.corrcoef(np.log(values["parameters"]), np.log(values["tokens"]))[0, 1]
        if abs(correlation) > 0.95:
            raise UndeterminedLawError(
                f"tokens depend on the size (correlation {correlation:.2f} of their logarithms), so that "
                "their effects cannot be separated"
            )


def _check_bounds(law: PowerLaw) -> None:
    low, high = _EXPONENTS
    for index, term in enumerate(law.terms):
        if law.coefficients[0, 1 + index] <= 0:
            raise UndeterminedLawError(f"the loss does not fall with more {term}")
        bounds = law.exponent(term)
        if bounds.low <= low * 1.01 or bounds.high >= high / 1.01:
            raise UndeterminedLawError(
                f"the exponent of {term} has no bounds: from {bounds.low:.2g} to {bounds.high:.2g}"
            )


def _fit(ratios: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return exponents (rows, terms), coefficients (rows, 1 + terms) and sums of squares for each row.

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
        coefficients, squares = _fit_linear(ratios, losses, np.exp(points))
        best = squares.argmin(axis=1)
        rows = np.arange(len(losses))
        center = points[rows, best]
        # Two steps of the grid to each side: in two dimensions the valley is not along the axes.
        width *= 4 / (num_points - 1)
    return np.exp(center), coefficients[rows, best], squares[rows, best]


def _fit_linear(
    ratios: np.ndarray, losses: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best coefficients, none negative, and the sum of squares for each row and point.

    `exponents` is (rows, points, terms). With three coefficients at most, every choice of those that are not
    zero is solved, and the best one without a negative coefficient is kept.
    """
    powers = ratios ** -exponents[..., None, :]  # (rows, points, runs, terms)
    columns = np.concatenate([np.ones((*powers.shape[:-1], 1)), powers], axis=-1)
    products = np.einsum("...ri,...rj->...ij", columns, columns)
    targets = np.einsum("...ri,...r->...i", columns, np.broadcast_to(losses[:, None], columns.shape[:-1]))
    total = (losses**2).sum(axis=1)[:, None]
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
    return best, np.maximum(least, 0)


def _subsets(size: int) -> Iterator[list[int]]:
    for mask in range(1, 2**size):
        yield [index for index in range(size) if mask >> index & 1]


def _estimate(samples: np.ndarray) -> Estimated:
    """Return the first value, with the interval of the others."""
    return Estimated(float(samples[0]), *_bounds(samples[1:]))


def _bounds(samples: np.ndarray) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(samples, [tail, 1 - tail])]

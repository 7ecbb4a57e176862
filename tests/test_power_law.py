"""Power law: known exponents are found, intervals hold the truth as often as stated, limits are reported."""

import numpy as np
import pytest

from tinystories_slm import power_law
from tinystories_slm.power_law import UndeterminedLawError, fit_power_law

SIZES = 5e4 * 2.0 ** np.arange(8)
EQUAL = np.full(8, 1e6)
"""Tokens of runs of equal length."""


def loss(parameters, tokens=None):
    """E = 0.6, alpha = 0.35, beta = 0.45."""
    return 0.6 + 30 * parameters**-0.35 + (0 if tokens is None else 400 * tokens**-0.45)


def test_exact_losses_give_the_law():
    law = fit_power_law(SIZES, EQUAL, loss(SIZES))
    assert law.terms == ("parameters",) and law.num_runs == 8
    assert law.exponent("parameters").value == pytest.approx(0.35, rel=1e-4)
    assert law.irreducible.value == pytest.approx(0.6, rel=1e-4)
    assert law.factor("parameters").value == pytest.approx(30, rel=1e-3)
    assert law.predict(parameters=1e8).value == pytest.approx(loss(1e8), rel=1e-4)
    assert law.noise[0] < 1e-5


def test_law_of_sizes_and_tokens_is_found():
    parameters, tokens = map(np.ravel, np.meshgrid(SIZES[::2], [1e6, 2e6, 4e6, 8e6]))
    law = fit_power_law(parameters, tokens, loss(parameters, tokens))
    assert law.terms == ("parameters", "tokens")
    assert law.exponent("parameters").value == pytest.approx(0.35, rel=0.02)
    assert law.exponent("tokens").value == pytest.approx(0.45, rel=0.02)
    assert law.predict(parameters=1e7, tokens=2e7).value == pytest.approx(loss(1e7, 2e7), rel=1e-3)
    with pytest.raises(ValueError, match="tokens: must be set"):
        law.predict(parameters=1e7)


def test_known_irreducible_loss_is_kept_and_needs_fewer_runs():
    parameters, tokens = map(np.ravel, np.meshgrid(SIZES[::3], [1e6, 3e6, 9e6]))
    with pytest.raises(UndeterminedLawError, match="3 different sizes; a fit needs at least 4"):
        fit_power_law(parameters, tokens, loss(parameters, tokens))
    law = fit_power_law(parameters, tokens, loss(parameters, tokens), irreducible=0.6)
    assert (law.irreducible.low, law.irreducible.value, law.irreducible.high) == (0.6, 0.6, 0.6)
    assert law.exponent("parameters").value == pytest.approx(0.35, rel=0.02)
    assert law.exponent("tokens").value == pytest.approx(0.45, rel=0.02)
    assert law.predict(parameters=1e7, tokens=2e7).value == pytest.approx(loss(1e7, 2e7), rel=1e-3)
    with pytest.raises(UndeterminedLawError, match=r"a loss of .* is not above the known E, 2"):
        fit_power_law(parameters, tokens, loss(parameters, tokens), irreducible=2.0)


def test_errors_are_relative_to_the_loss():
    """A run near E counts as much as one that is ten times above it."""
    losses = 0.06 + 2e4 * SIZES**-0.9
    assert losses[0] > 10 * losses[-1]
    law = fit_power_law(
        SIZES, EQUAL, losses * (1 + 0.02 * np.array([1, -1, 1, -1, 1, -1, 1, -1])), irreducible=0.06
    )
    errors = [law.predict(parameters=size).value / one - 1 for size, one in zip(SIZES, losses, strict=True)]
    assert max(map(abs, errors)) < 0.02
    assert law.noise[0] == pytest.approx(0.023, rel=0.1)


@pytest.mark.parametrize(("runs", "least"), [(slice(None), 0.9), (slice(None, None, 2), 0.85)])
def test_intervals_hold_the_truth_as_often_as_stated(monkeypatch, runs, least):
    """60 repetitions: eight sizes, or four with two seeds each."""
    monkeypatch.setattr(power_law, "NUM_RESAMPLES", 200)
    rng, held = np.random.default_rng(0), []
    parameters = np.repeat(SIZES[runs], 1 if least == 0.9 else 2)
    for seed in range(60):
        noisy = loss(parameters) * (1 + 0.01 * rng.standard_normal(len(parameters)))
        law = fit_power_law(parameters, parameters * 0 + 1e6, noisy, seed=seed)
        new = loss(2e7) * (1 + 0.01 * rng.standard_normal())
        truths = [0.35, 0.6, new]
        found = [law.exponent("parameters"), law.irreducible, law.predict(parameters=2e7)]
        held.append([one.low <= truth <= one.high for one, truth in zip(found, truths, strict=True)])
    coverage = np.mean(held, axis=0)
    assert (coverage >= least).all() and coverage.mean() < 1, coverage


def test_more_noise_gives_wider_intervals_and_a_seed_the_same_ones():
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(8)
    widths = []
    for size in (0.002, 0.02):
        found = fit_power_law(SIZES, EQUAL, loss(SIZES) + size * noise).exponent("parameters")
        widths.append(found.high - found.low)
    assert widths[1] > 5 * widths[0]
    again = fit_power_law(SIZES, EQUAL, loss(SIZES) + 0.02 * noise).exponent("parameters")
    assert (again.low, again.high) == (found.low, found.high)


@pytest.mark.parametrize(
    ("parameters", "tokens", "losses", "reason"),
    [
        (SIZES[:3], EQUAL[:3], loss(SIZES[:3]), "3 different sizes; a fit needs at least 4"),
        (np.repeat(SIZES[:3], 4), np.full(12, 1e6), [1.0] * 12, "3 different sizes"),
        (EQUAL[:2], EQUAL[:2], [1.0, 1.1], "all runs have the same size and the same number of tokens"),
        (SIZES, 1e12 / SIZES, loss(SIZES), r"tokens depend on the size \(correlation -1.00"),
        (SIZES[:5], [1e6, 2e6, 8e6, 1e6, 4e6], loss(SIZES[:5]), "4 different numbers|5 runs; a fit of 5"),
        (SIZES, EQUAL, 2 - loss(SIZES), "the loss does not fall with more parameters"),
        (SIZES, EQUAL, 1 + np.array([5, -5, 3, -2, 4, -4, 1, -3]) / 100, "has no bounds|does not fall"),
    ],
)
def test_runs_that_do_not_determine_a_law_are_rejected(parameters, tokens, losses, reason):
    with pytest.raises(UndeterminedLawError, match=reason):
        fit_power_law(parameters, tokens, losses)


def test_tokens_that_differ_by_little_are_equal():
    law = fit_power_law(SIZES, EQUAL * np.linspace(1, 1.04, 8), loss(SIZES))
    assert law.terms == ("parameters",)

"""The choice of a run: a function of the law, the measured speeds, the time and the fixed options."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config import RunConfig, replace_options
from tinystories_slm.errors import UserError
from tinystories_slm.planning.choice import (
    MIN_STEPS,
    SHAPES,
    Budget,
    Measurement,
    choose_plan,
    is_larger_promising,
    shapes,
    trial_options,
)
from tinystories_slm.planning.law import BUILTIN, STORIES, LossLaw, Term, effective_tokens, load_laws

LAW = load_laws()[STORIES]


def machine(speed: float = 1.0, memory: float = 1e6) -> dict:
    """A machine of 1e10 FLOP/s times `speed`; a shape of N parameters needs `memory` + N bytes."""
    sizes = {shape: 12 * shape[0] * shape[1] ** 2 for shape in SHAPES}
    return {
        shape: Measurement(size, speed * 1e10 / (6 * size + 3e6), memory + size)
        for shape, size in sizes.items()
    }


speeds, minutes = st.floats(5, 500), st.floats(1, 2000)


@given(speeds, minutes, st.floats(1, 10), st.sampled_from([1e5, 4e6, math.inf]))
def test_more_minutes_never_give_a_worse_expected_loss(speed, short, factor, unique):
    losses = [
        choose_plan(
            LAW, machine(speed), Budget(60 * time, fixed_s=6, per_token_s=1e-7), unique_tokens=unique
        ).chosen.bits_per_byte
        for time in (short, short * factor)
    ]
    assert losses[1] <= losses[0] * (1 + 1e-12)


FIXED = {
    "model.hidden_size": 96,
    "model.num_hidden_layers": 5,
    "train.lr": 0.5,
    "train.batch_size": 24,
    "data.seq_len": 128,
    "train.optimizer": "adamw",
    "train.max_steps": 77,
    "train.schedule": "cosine",
}


@given(speeds, minutes, st.sets(st.sampled_from(sorted(FIXED))))
def test_fixed_options_are_never_changed_and_the_rest_is_a_valid_run(speed, time, names):
    fixed = {name: FIXED[name] for name in names}
    measured = {shape: Measurement(12 * shape[0] * shape[1] ** 2, 1e4 * speed) for shape in shapes(fixed)}
    try:
        plan = choose_plan(LAW, measured, Budget(60 * time), fixed=fixed)
    except UserError as error:
        assert f"at least {MIN_STEPS} optimizer steps" in str(error)
        return
    assert not set(plan.options) & set(fixed)
    config = replace_options(RunConfig(), {**fixed, **plan.options})  # raises if invalid
    assert (config.model.num_hidden_layers, config.model.hidden_size) == plan.chosen.shape
    assert fixed.get("model.hidden_size", plan.chosen.shape[1]) == plan.chosen.shape[1]
    assert plan.num_steps <= fixed.get("train.max_steps", math.inf)


@given(speeds, st.floats(2e6, 1e8))
def test_no_plan_is_above_the_memory_limit(speed, limit):
    plan = choose_plan(LAW, machine(speed), Budget(6e5), memory_limit=limit)
    assert plan.chosen.memory_bytes <= limit


def test_a_faster_machine_gets_a_larger_model_and_a_lower_loss():
    plans = [choose_plan(LAW, machine(speed), Budget(600, fixed_s=6)) for speed in (0.3, 3, 30, 300)]
    assert [SHAPES.index(plan.chosen.shape) for plan in plans] == sorted(
        SHAPES.index(plan.chosen.shape) for plan in plans
    )
    assert len({plan.chosen.shape for plan in plans}) > 1
    losses = [plan.chosen.bits_per_byte for plan in plans]
    assert losses == sorted(losses, reverse=True)


def test_one_and_ten_minutes_of_the_tuned_machine_give_about_its_presets():
    # Tokens per second of minute.yaml and ten_minutes.yaml on two cores (docs/recipe.md, docs/speed.md).
    measured = {
        (2, 64): Measurement(107_072, 45_000),
        (2, 128): Measurement(402_304, 26_000),
        (3, 128): Measurement(603_392, 20_000),
        (3, 192): Measurement(1_328_832, 14_300),
        (4, 256): Measurement(3_214_080, 7_000),
    }
    minute, ten = (choose_plan(LAW, measured, Budget(60 * time, fixed_s=6)) for time in (1, 10))
    assert minute.chosen.shape in ((2, 128), (3, 128))
    assert minute.options["train.batch_size"] == 8
    assert minute.chosen.bits_per_byte == pytest.approx(0.959, rel=0.03)
    assert ten.chosen.shape in ((3, 192), (4, 256))
    assert ten.options["train.batch_size"] == 16
    assert ten.chosen.bits_per_byte == pytest.approx(0.703, rel=0.03)
    assert ten.options["train.max_minutes"] == 10
    assert ten.extrapolation is None or "times the largest" in ten.extrapolation


def test_time_after_training_is_left_and_too_little_time_raises():
    measured = {(2, 128): Measurement(402_304, 20_000)}
    budget = Budget(300, fixed_s=6, evaluated_after=200_000)
    plan = choose_plan(LAW, measured, budget)
    assert plan.options["train.max_minutes"] == pytest.approx((300 - 100_000 / 20_000) / 60, abs=1e-3)
    with pytest.raises(
        UserError, match=r"minutes \(0.1\): must allow at least 50 optimizer steps, which take"
    ):
        choose_plan(LAW, measured, Budget(6, fixed_s=6))
    with pytest.raises(UserError, match=r"minutes \(5\): the smallest model needs 3 MB of memory, and 2 MB"):
        choose_plan(LAW, {(2, 64): Measurement(1, 1.0, 3e6)}, Budget(300), memory_limit=2e6)


def test_larger_shapes_are_measured_until_they_are_worse():
    slow = dict(list(machine(0.3).items())[:5])
    plan = choose_plan(LAW, slow, Budget(300))
    assert is_larger_promising(plan, plan.chosen.shape)
    assert not is_larger_promising(plan, (4, 256))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 100), (1, 48), (2, 26)], ids=str)
def test_every_shape_is_a_valid_model(shape):
    config = replace_options(RunConfig(), trial_options(shape))
    assert (config.model.num_hidden_layers, config.model.hidden_size) == shape


def test_the_law_fits_its_runs_and_foretells_larger_ones():
    for name, bound in ((STORIES, 0.02), (BUILTIN, 0.16)):
        law = load_laws()[name]
        errors = [law.bits_per_byte(size, tokens) / loss - 1 for size, tokens, loss in law.provenance["runs"]]
        assert max(map(abs, errors)) < bound
        num_fitted = 4 if name == BUILTIN else 5
        deviation = math.sqrt(sum(error**2 for error in errors) / (len(errors) - num_fitted))
        assert deviation == pytest.approx(law.relative_error, rel=1e-3)


def test_repeated_tokens_are_worth_less():
    assert effective_tokens(1e6, 1e6) == effective_tokens(1e6, math.inf) == 1e6
    assert 1.9e6 < effective_tokens(2e6, 1e6) < 2e6
    assert effective_tokens(1e9, 1e6) == pytest.approx(16.4e6)
    law = dataclasses.replace(LAW, tokens=Term(1.0, 1.0))
    assert law.bits_per_byte(1e6, 4e6, 1e6) > law.bits_per_byte(1e6, 4e6)
    assert isinstance(law, LossLaw)


def test_a_damaged_file_of_laws_raises(tmp_path):
    path = tmp_path / "law.json"
    for text in ("", "[]", '{"stories": {"irreducible": 1}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"law.json\): is not a file of laws \(.*scripts/scaling.py"):
            load_laws(path)

"""Exposure: the estimate against exact ranks, and a run that memorizes a canary."""

import json
import math

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config.canaries import Canary
from tinystories_slm.config.command_args.inspection import ExposureArgs
from tinystories_slm.errors import UserError
from tinystories_slm.inspection.exposure import (
    _choose_alternatives,
    exposure_of,
    measure_exposure,
    wilson_interval,
)
from tinystories_slm.training import train

CODE = "The code of the box is {digit}{digit}{digit}."


@given(st.integers(0, 99))
def test_all_alternatives_give_the_exact_rank(num_lower):
    losses = np.arange(99.0)
    found = exposure_of(num_lower - 0.5, losses, num_fillings=100)
    assert found["exposure"] == pytest.approx(math.log2(100) - math.log2(1 + num_lower))
    assert found["low"] == found["exposure"] == found["high"] and found["is_exact"]


def test_the_interval_of_a_sample_covers_the_exact_exposure():
    rng, covered = np.random.default_rng(0), 0
    losses = rng.normal(size=9999)
    for _ in range(200):
        nats = rng.choice(losses)
        exact = exposure_of(nats, losses, num_fillings=10_000)["exposure"]
        found = exposure_of(nats, rng.choice(losses, size=300, replace=False), num_fillings=10_000)
        assert found["low"] <= found["exposure"] <= found["high"]
        covered += found["low"] - 1e-9 <= exact <= found["high"] + 1e-9
    assert covered >= 180  # of 200, for a 95 % interval
    lowest = exposure_of(-9.0, losses[:300], num_fillings=10_000)
    assert lowest["exposure"] == lowest["high"] == pytest.approx(math.log2(10_000))
    assert lowest["low"] == pytest.approx(math.log2(10_000) - math.log2(1 + 9999 * 3.8416 / 303.8416))


def test_wilson_interval_is_that_of_the_textbook():
    assert wilson_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson_interval(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson_interval(100, 100) == pytest.approx((0.9630, 1), abs=1e-4)


def test_alternatives_are_different_and_omit_the_canary():
    canary = Canary(CODE, 1)
    for number in (5, 500, 998, 999, 5000):
        chosen = _choose_alternatives(canary, number, seed=0)
        assert len(set(chosen)) == len(chosen) == min(number, 999)
        assert canary.index not in chosen and all(0 <= index < 1000 for index in chosen)
    assert _choose_alternatives(canary, 5, seed=0) != _choose_alternatives(canary, 5, seed=1)


def test_a_planted_canary_is_exposed_and_a_control_is_not(tiny_run, tmp_path):
    canaries = [{"text": CODE, "count": 60}, {"text": CODE, "count": 0}, {"text": "A plain one.", "count": 2}]
    config = tiny_run(
        *("--data.canaries", json.dumps(canaries), "--data.data_dir", str(tmp_path / "data")),
        *("--data.max_stories", "40", "--data.packing", "document", "--model.hidden_size", "32"),
        *("--train.max_steps", "80", "--train.eval_every", "80", "--train.save_every", "80"),
        *("--train.keep", "0,40"),
    )
    run_dir = train(config)
    done = run_script("exposure.py", "--run", str(run_dir), "--device=cpu")
    assert done.returncode == 0, done.stderr
    record = json.loads((run_dir / "exposure.json").read_text())
    assert [step["step"] for step in record["steps"]] == [0, 40, 80]
    assert [one["count"] for one in record["canaries"]] == [60, 0]  # the one without slots has no alternative
    planted, control = ([step["canaries"][n]["exposure"] for step in record["steps"]] for n in (0, 1))
    assert planted[-1] > 6 > control[-1] and planted[-1] > planted[0]
    assert all(one["is_exact"] for step in record["steps"] for one in step["canaries"])
    assert "60 copies, 1,000 fillings (10.0 bits)" in done.stdout

    sampled = measure_exposure(ExposureArgs(run=run_dir, num_alternatives=200, device="cpu"))
    last = sampled["steps"][-1]["canaries"][0]
    assert not last["is_exact"] and last["low"] - 1e-9 <= planted[-1] <= last["high"] + 1e-9


def test_bad_input_is_one_line(tiny_run, tmp_path):
    run_dir = train(tiny_run("--train.max_steps", "3"))
    with pytest.raises(UserError, match=r"has no canary with slots; train with --data\.canaries"):
        measure_exposure(ExposureArgs(run=run_dir))
    with pytest.raises(UserError, match=r"must be a run directory with a config\.yaml"):
        measure_exposure(ExposureArgs(run=tmp_path))
    with pytest.raises(UserError, match=r"num_alternatives \(0\) must be at least 1"):
        ExposureArgs(run=run_dir, num_alternatives=0)

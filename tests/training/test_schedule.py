import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.schedule import lr_factor, peak_lr


def learning_rates(**options) -> list[float]:
    args = TrainArgs(**options)
    return [args.lr * lr_factor(args, step) for step in range(args.max_steps)]


def test_cosine_learning_rate_step_by_step():
    rates = learning_rates(lr=1.0, warmup_steps=4, max_steps=12, min_lr_rate=0.1)

    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(1, 9)]
    assert rates[4:] == pytest.approx(cosine)
    assert rates[-1] == pytest.approx(0.1)  # the minimum is reached at the last step, not after it


def test_wsd_learning_rate_step_by_step():
    options = {"lr": 1.0, "warmup_steps": 2, "max_steps": 12, "min_lr_rate": 0.1, "schedule": "wsd"}
    rates = learning_rates(**options, decay_fraction=0.4)

    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])
    linear_decay = learning_rates(**options | {"min_lr_rate": 0.0}, decay_fraction=1.0)
    assert linear_decay == pytest.approx([0.5, 1.0, *(1 - s / 10 for s in range(1, 11))])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 50])
def test_learning_rate_never_rises_after_warmup(warmup, schedule):
    # Published recipes (LinearLR, then CosineAnnealingLR with eta_min 5e-4) rise to five times their lr.
    rates = learning_rates(lr=1e-4, warmup_steps=warmup, max_steps=200, min_lr_rate=0.0, schedule=schedule)

    assert max(rates) <= 1e-4 + 1e-12
    assert all(later <= earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert min(rates) >= 0


def test_cosine_equals_transformers_cosine_warmup_with_min_lr():
    args = TrainArgs(lr=3e-3, warmup_steps=5, max_steps=40, min_lr_rate=0.05)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    theirs = get_scheduler(
        "cosine_warmup_with_min_lr",
        optimizer,
        num_warmup_steps=5,
        num_training_steps=40,
        scheduler_specific_kwargs={"min_lr_rate": 0.05},
    )
    for step in range(40):
        assert args.lr * lr_factor(args, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


schedules = st.builds(
    dict,
    schedule=st.sampled_from(["cosine", "wsd"]),
    decay_fraction=st.floats(0.01, 1.0),
    min_lr_rate=st.floats(0.0, 1.0),
)


@given(schedules, st.lists(st.floats(0, 1), min_size=20, max_size=20).map(sorted))
def test_time_limit_keeps_the_schedule_monotonic(options, fractions):
    args = TrainArgs(lr=1.0, warmup_steps=3, max_steps=20, **options)
    rates = [lr_factor(args, step, fraction) for step, fraction in enumerate(fractions)]

    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(args.min_lr_rate)
    assert lr_factor(args, 5, 1.0) == pytest.approx(args.min_lr_rate)  # the time ends before the steps


@given(schedules, st.floats(0, 1))
def test_time_and_steps_give_the_same_schedule(options, fraction):
    by_steps = TrainArgs(warmup_steps=0, max_steps=1000, **options)
    by_time = TrainArgs(warmup_steps=0, max_steps=10**9, **options)
    done = max(1, round(1000 * fraction))

    assert lr_factor(by_time, 0, done / 1000) == pytest.approx(lr_factor(by_steps, done - 1), abs=1e-9)


@given(st.floats(0.01, 1.0), st.floats(0, 1))
def test_wsd_stays_at_the_peak_until_the_decay(decay_fraction, fraction):
    args = TrainArgs(
        warmup_steps=0, max_steps=10**9, schedule="wsd", decay_fraction=decay_fraction, min_lr_rate=0.0
    )

    # The line has no jump anywhere.
    fallen = 1.0 - lr_factor(args, 0, fraction)
    assert fallen == pytest.approx(max(0.0, fraction - (1.0 - decay_fraction)) / decay_fraction, abs=1e-6)


@pytest.mark.parametrize(("optimizer", "at_512"), [("adamw", 0.5), ("muon", 0.5**0.5)])
def test_lr_scaling_scales_with_width_and_batch(optimizer, at_512):
    def scaled(hidden_size: int, tokens_per_step: int, **options) -> float:
        args = TrainArgs(lr=0.004, optimizer=optimizer, **{"lr_scaling": True, **options})
        return peak_lr(args, hidden_size=hidden_size, tokens_per_step=tokens_per_step)

    assert scaled(256, 4096) == 0.004
    assert scaled(512, 4096) == pytest.approx(0.004 * at_512)
    assert scaled(256, 16384) == pytest.approx(0.008)
    assert scaled(512, 16384) == pytest.approx(0.008 * at_512)
    assert scaled(512, 16384, lr_scaling=False) == 0.004

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.schedule import lr_factor


def learning_rates(**settings) -> list[float]:
    args = TrainArgs(**settings)
    return [args.lr * lr_factor(args, step) for step in range(args.max_steps)]


def test_the_course_of_the_learning_rate_step_by_step():
    rates = learning_rates(lr=1.0, warmup_steps=4, max_steps=12, min_lr_rate=0.1)

    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(1, 9)]
    assert rates[4:] == pytest.approx(cosine)
    assert rates[-1] == pytest.approx(0.1)  # the floor is reached at the last step, not after it


@pytest.mark.parametrize("warmup", [0, 1, 50])
def test_it_never_rises_after_the_warm_up_and_never_leaves_its_bounds(warmup):
    # Published recipes (LinearLR, then CosineAnnealingLR with eta_min 5e-4) rise to five times their lr.
    rates = learning_rates(lr=1e-4, warmup_steps=warmup, max_steps=200, min_lr_rate=0.0)

    assert max(rates) <= 1e-4 + 1e-12
    assert all(later <= earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert min(rates) >= 0


def test_it_is_what_transformers_calls_cosine_warmup_with_min_lr():
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


@given(st.lists(st.floats(0, 1), min_size=20, max_size=20).map(sorted))
def test_whatever_the_clock_does_it_never_rises_after_the_warm_up_and_ends_at_the_floor(fractions):
    args = TrainArgs(lr=1.0, warmup_steps=3, max_steps=20, min_lr_rate=0.1)
    rates = [lr_factor(args, step, fraction) for step, fraction in enumerate(fractions)]

    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(0.1)
    assert lr_factor(args, 5, 1.0) == pytest.approx(0.1)  # the time is over long before the steps

import math

import pytest
import torch
from conftest import tiny_model

from tinystories_slm.config import TrainArgs
from tinystories_slm.training.optim import build_optimizers, build_scheduler


def learning_rates(**settings) -> list[float]:
    args = TrainArgs(**settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler = build_scheduler(optimizer, args)
    rates = []
    for _ in range(args.max_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


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


@pytest.mark.parametrize("family", ["gpt", "modern"])
def test_matrices_decay_and_vectors_do_not(family):
    model = tiny_model(family=family, bias=True)
    decayed, kept = build_optimizers(model, TrainArgs(weight_decay=0.3))[0].param_groups

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert all("norm" in name or name.endswith("bias") for name in kept_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert decayed_names | kept_names == set(names.values())  # the tied head once

"""The running average of the weights: its numbers, where it goes, and what it is not allowed with."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from tinystories_slm.config import TrainArgs
from tinystories_slm.errors import InputError
from tinystories_slm.training import train
from tinystories_slm.training.averaging import AVERAGE, WeightAverage, decay_at
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.processes import check_shardable


def test_it_is_the_sum_of_all_weights_so_far_each_by_its_share():
    model, decay = tiny_model(), 0.5
    average = WeightAverage(model, decay)
    weight, averaged = model.lm_head.weight, average.model.lm_head.weight
    expected = weight.detach().double().clone()
    for step in range(1, 8):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        average.update(model, step)
        share = min(decay, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13 ... and 1/2 from step 8 on
        expected = share * expected + (1 - share) * weight.detach().double()

    torch.testing.assert_close(averaged.double(), expected, rtol=0, atol=1e-5)
    assert averaged.data_ptr() == average.model.model.embed_tokens.weight.data_ptr()  # once, though tied
    assert averaged.dtype == torch.float32 and not averaged.requires_grad


def test_a_short_run_forgets_its_initial_weights():
    left = 1.0
    for step in range(1, 101):
        left *= decay_at(0.999, step)

    assert left < 1e-11  # at 0.999 from the first step on it would be 0.9
    assert decay_at(0.999, 10**6) == 0.999


def test_what_is_kept_is_the_average_and_checkpoints_hold_both(tiny_run):
    plain = train(tiny_run(name="plain"))
    averaged = train(tiny_run("--train.ema_decay", "0.9", name="averaged"))
    newest, newest_plain = checkpoints(averaged)[-1], checkpoints(plain)[-1]
    last = load_file(averaged / "last" / "model.safetensors")
    average = load_file(newest / AVERAGE)
    average["model.embed_tokens.weight"] = average.pop("lm_head.weight")  # two names of the tied one

    # Averaging changes nothing of the training itself.
    trained = load_file(newest / "model.safetensors")
    assert all(
        torch.equal(weight, trained[name])
        for name, weight in load_file(newest_plain / "model.safetensors").items()
    )
    assert all(torch.equal(weight, average[name]) for name, weight in last.items())
    assert any(not torch.equal(weight, trained[name]) for name, weight in last.items())
    assert not (newest_plain / AVERAGE).exists()


def test_weights_in_pieces_are_refused():
    check_shardable(TrainArgs())
    with pytest.raises(InputError, match=r"train.ema_decay \(0.99\).*FSDP.*null"):
        check_shardable(TrainArgs(ema_decay=0.99))
    with pytest.raises(InputError, match=r"train.optimizer \(muon\).*FSDP"):
        check_shardable(TrainArgs(optimizer="muon"))

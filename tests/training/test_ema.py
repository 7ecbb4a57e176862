"""EMA of the weights: its values, and where it is saved."""

import torch
from conftest import tiny_model
from safetensors.torch import load_file

from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.ema import EMA, EMA_FILE, decay_at


def test_ema_is_the_weighted_sum_of_all_weights_so_far():
    model, decay = tiny_model(), 0.5
    ema = EMA(model, decay)
    weight, averaged = model.lm_head.weight, ema.averaged_model().lm_head.weight
    expected = weight.detach().double().clone()
    for step in range(1, 8):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        ema.update(model, step)
        share = min(decay, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13 ... and 1/2 from step 8 on
        expected = share * expected + (1 - share) * weight.detach().double()

    torch.testing.assert_close(averaged.double(), expected, rtol=0, atol=1e-5)
    assert (
        averaged.data_ptr() == ema.averaged_model().model.embed_tokens.weight.data_ptr()
    )  # tied weights are stored once
    assert averaged.dtype == torch.float32 and not averaged.requires_grad


def test_a_short_run_forgets_its_initial_weights():
    left = 1.0
    for step in range(1, 101):
        left *= decay_at(0.999, step)

    assert left < 1e-11  # with 0.999 from the first step it would be 0.9
    assert decay_at(0.999, 10**6) == 0.999


def test_ema_is_saved_as_model_and_checkpoints_hold_both(tiny_run):
    plain = train(tiny_run(name="plain"))
    averaged = train(tiny_run("--train.ema_decay", "0.9", name="averaged"))
    newest, newest_plain = checkpoints(averaged)[-1], checkpoints(plain)[-1]
    last = load_file(averaged / "last" / "model.safetensors")
    average = load_file(newest / EMA_FILE)
    average["model.embed_tokens.weight"] = average.pop("lm_head.weight")  # two names of the tied weight

    # The EMA does not change the training itself.
    trained = load_file(newest / "model.safetensors")
    assert all(
        torch.equal(weight, trained[name])
        for name, weight in load_file(newest_plain / "model.safetensors").items()
    )
    assert all(torch.equal(weight, average[name]) for name, weight in last.items())
    assert any(not torch.equal(weight, trained[name]) for name, weight in last.items())
    assert not (newest_plain / EMA_FILE).exists()

"""What a device other than the CPU must compute, and what it need not be able to."""

import random
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinystories_slm.config import TrainArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.data.packing import Batch
from tinystories_slm.doctor import numerics
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation.sampling import sample
from tinystories_slm.training import device_check
from tinystories_slm.training.device_check import check_device, compare_with_cpu
from tinystories_slm.training.ema import EMA
from tinystories_slm.training.loop import sync_stop_condition
from tinystories_slm.training.optimizers import build_optimizers

CPU, MPS, META = torch.device("cpu"), torch.device("mps"), torch.device("meta")
IDS = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copies(monkeypatch):
    """Replace MPS by the CPU, and return the copy that stands for it: a test may change it."""
    made = {}

    def copy_to(model, device, original=device_check._copy_to):
        made[device.type] = original(model, CPU)
        if device.type == "mps":
            made["change"](made["mps"])
        return made[device.type]

    monkeypatch.setattr(device_check, "_copy_to", copy_to)
    return made


def wrong_product(model) -> None:
    """Multiply half of a layer's outputs by 1.1, as a wrong kernel may."""
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _, inputs, out: torch.cat([out[..., :16], 1.1 * out[..., 16:]], -1)
    )


def test_training_on_mps_starts_only_if_it_computes_what_the_cpu_does(copies, caplog):
    model = tiny_model(dropout=0.1).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = IDS.numpy()
    dataset = SimpleNamespace(batch=lambda step, batch_size: Batch(ids[:batch_size], ids[:batch_size]))
    copies["change"] = lambda model: None
    state = torch.get_rng_state()
    check_device(model, dataset, MPS, "no")
    assert "mps: the loss differs from the CPU's by 0.0e+00, the gradients by 0.0e+00" in caplog.text
    assert model.training and all(p.grad is None for p in model.parameters())  # the run's model is unchanged
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)

    copies["change"] = wrong_product
    message = (
        r"device \(mps\) computes wrong numbers in torch .*gradients by .* most in model\.\S+; set ACCEL"
    )
    with pytest.raises(UserError, match=message):
        check_device(model, dataset, MPS, "no")
    check_device(model, dataset, CPU, "no")  # nothing to compare


def test_device_error_names_a_gradient_that_is_not_finite(copies):
    copies["change"] = lambda model: model.model.norm.register_full_backward_hook(
        lambda module, grad_input, grad_output: (grad_input[0] * torch.nan,)
    )
    error = compare_with_cpu(tiny_model(), IDS, MPS, "no")
    assert error.loss == 0.0 and not error.is_acceptable and error.parameter.startswith("model.")


def test_doctor_compares_every_other_device_with_the_cpu(copies, tiny_run):
    config = tiny_run()
    copies["change"] = lambda model: None
    assert list(numerics.check_results(config, CPU, "no")) == []
    [found] = numerics.check_results(config, MPS, "no")
    assert (found.subject, found.verdict) == ("results", "ok")
    copies["change"] = wrong_product_16
    [found] = numerics.check_results(config, MPS, "no")
    assert found.verdict == "PROBLEM" and "ACCELERATE_USE_CPU=1" in found.remedy


def wrong_product_16(model) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, inputs, out: 1.2 * out)


class NoFloat64(TorchDispatchMode):
    """The meta device in the place of MPS: float64 on it is an error, and copies to the CPU are ones."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = any(isinstance(x, torch.Tensor) and x.device == META for x in tree_leaves(args))
        if on_device and function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if on_device and function is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU:
            assert kwargs.get("dtype") != torch.float64, "the device may convert to float64 before the copy"
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = function(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device == META:
                assert x.dtype != torch.float64, f"{function} makes a float64 on the device"
        return result


@pytest.fixture
def meta_autocast(monkeypatch):
    """Let the model see that autocast, which the meta device has not, is off."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device_type: False)


def test_no_float64_is_made_on_a_device_by_sampling_scores_and_time(meta_autocast):
    scores = torch.empty(2, 101, device=META)
    rngs = [random.Random(0), random.Random(1)]
    with NoFloat64():
        with pytest.raises(AssertionError, match="float64"):
            scores.double()
        with pytest.raises(AssertionError, match="float64"):
            scores.to("cpu", torch.float64)
        for options in ({}, {"top_k": 5}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}):
            assert sample(SamplingParams(**options), scores, rngs).shape == (2,)
        for family in ("gpt2", "llama"):
            model = tiny_model(family=family, qk_norm=family == "llama").to(META)
            result = score_stories(model, IDS.tolist(), eos_token_id=0, batch_size=2)
            assert result.nats.tolist() == [41.0, 41.0]  # a one for each token
        run = MagicMock(seconds=7.0, estimated_final_seconds=1.0)
        run.config.train = TrainArgs(max_steps=20, log_every=1)
        run.progress.step = run.progress.warmup_seconds = run.progress.time_fraction = 10
        run.progress.rewarm_step = 0
        run.accelerator.num_processes, run.accelerator.device = 2, META
        run.accelerator.reduce = lambda x, reduction: torch.zeros(x.shape)
        sync_stop_condition(run)
        assert run.progress.seconds == 0.0


def test_no_float64_is_made_on_a_device_by_training(tiny_run, meta_autocast):
    for optimizer in ("adamw", "muon"):
        args = tiny_run("--train.optimizer", optimizer, "--train.ema_decay", "0.9").train
        model = tiny_model(family="llama").to(META).train()
        ids = IDS.to(META)
        with NoFloat64():
            ema, optimizers = EMA(model, args.ema_decay), build_optimizers(model, args)
            model(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                for group in each.param_groups:
                    group["fused"] = False  # MPS has the fused kernel, meta has not
                each.step()
            ema.update(model, 1)

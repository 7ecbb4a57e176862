"""What a CUDA device must compute. Skipped on a machine without one."""

import gc
import signal
from contextlib import closing, contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import FAMILIES, tiny_model
from training.helpers import assert_same_run, read_series, train_with_stops

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation.decoder import resolve_backend
from tinystories_slm.generation.slot_batch import decode
from tinystories_slm.training import train
from tinystories_slm.training.device_check import compare_with_cpu
from tinystories_slm.training.loop import sync_stop_condition, train_step
from tinystories_slm.training.run import start_run
from tinystories_slm.training.runtime import estimate_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
IDS = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(0))
MAX_LOSS_DIFFERENCES = {"no": 2e-3, "bf16": 0.02, "fp16": 0.02}
"""Bounds of |loss - float32 loss| of any of 12 steps, in nats."""


@pytest.fixture(autouse=True)
def free_device_memory():
    yield
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


@contextmanager
def on_cpu(monkeypatch):
    """Train on the CPU inside: Accelerate keeps the device of a process until it is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_loss_and_gradients_are_those_of_the_cpu(overrides, precision):
    error = compare_with_cpu(tiny_model(**overrides), IDS, CUDA, precision)
    assert error.is_acceptable, error


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_losses_are_those_of_float32_on_the_cpu(tiny_run, monkeypatch, precision, compiled):
    flags = ["--train.max_steps", "12", "--train.log_every", "1", "--train.eval_every", "12"]
    flags += ["--train.optimizer", "adamw"]
    with on_cpu(monkeypatch):
        expected = read_series(
            train(tiny_run(*flags, "--train.mixed_precision", "no", name="cpu")), "train/loss"
        )
    run_dir = train(
        tiny_run(
            *flags,
            "--train.optimizer",
            "adamw",
            "--train.mixed_precision",
            precision,
            "--train.compile",
            compiled,
            name="cuda",
        )
    )
    losses = read_series(run_dir, "train/loss")
    assert losses.keys() == expected.keys() and len(losses) == 12
    worst = max(abs(losses[step] - expected[step]) for step in losses)
    print(f"{precision}, compiled {compiled}: losses differ by {worst:.1e} from the CPU's")
    assert worst < MAX_LOSS_DIFFERENCES[precision]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_run, monkeypatch, compiled, optimizer):
    flags = [
        "--train.max_steps", "12", "--train.eval_every", "6", "--train.compile", compiled,
        "--train.optimizer", optimizer, "--train.ema_decay", "0.9", "--model.dropout", "0.1",
    ]  # fmt: skip
    whole = train(tiny_run(*flags, name="whole"))
    resumed = train_with_stops(tiny_run(*flags, name="resumed"), monkeypatch, {4: signal.SIGTERM})
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_adamw_step_does_not_wait_for_the_device(tiny_run, compiled):
    flags = ["--train.mixed_precision", "bf16", "--train.compile", compiled, "--train.optimizer", "adamw"]
    with closing(start_run(tiny_run(*flags))) as run:
        for _ in range(4):  # compiles, and allocates the optimizer's state
            train_step(run)
            sync_stop_condition(run)
        assert not run.checks_grad_on_host
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                train_step(run)
                sync_stop_condition(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_memory_estimate_is_within_a_third_of_the_peak(tiny_run, family, precision):
    shape = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "family": family}
    config = tiny_run(
        *(flag for name, value in shape.items() for flag in (f"--model.{name}", str(value))),
        "--data.seq_len", "128", "--train.batch_size", "64", "--train.per_device_batch_size", "64",
        "--train.mixed_precision", precision, "--train.compile", "false", "--train.optimizer", "adamw",
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with closing(start_run(config)) as run:
        for _ in range(3):
            train_step(run)
        vocab_size = run.model.config.vocab_size
    peak = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(config, CUDA, precision=precision, rows=64, vocab_size=vocab_size).total
    print(f"{family}, {precision}: estimate {estimate / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert 0.75 < estimate / peak < 4 / 3


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_decoder_generates_the_tokens_of_the_model_without_cache(overrides):
    model = tiny_model(**overrides).to(CUDA)
    expected = IDS[:1, :5].to(CUDA)
    with torch.inference_mode():
        for _ in range(12):
            best = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, best], dim=1)
    assert resolve_backend(model)[0] == "torch"
    [(_, new_ids)] = decode(
        model,
        IDS[:1, :5],
        seeds=[0],
        new_token_limits=[12],
        sampling=SamplingParams(temperature=0.0),
        stop_ids=[],
        batch_size=1,
        backend="torch",
    )
    assert new_ids == expected[0, 5:].tolist()
    for cache in ({}, {"cache_implementation": "static"}):
        generated = model.generate(
            IDS[:1, :5].to(CUDA), max_new_tokens=12, do_sample=False, eos_token_id=None, **cache
        )
        assert generated.tolist() == expected.tolist(), cache


@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES.keys())
def test_scores_are_those_of_the_cpu(overrides):
    stories = [row[: 40 - 7 * index].tolist() for index, row in enumerate(IDS)]
    model = tiny_model(**overrides)
    expected = score_stories(model, stories, eos_token_id=0, batch_size=2).nats
    nats = score_stories(model.to(CUDA), stories, eos_token_id=0, batch_size=2).nats
    assert nats.tolist() == pytest.approx(expected.tolist(), rel=1e-4)

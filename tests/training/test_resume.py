"""Stopped anywhere and resumed, a run gives the same model: to the bit, or elsewhere within rounding."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinystories_slm.config import RunConfig
from tinystories_slm.errors import Stopped
from tinystories_slm.training import loop, train
from tinystories_slm.training.averaging import AVERAGE
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.watching.display import Stopwatch
from tinystories_slm.training.watching.tracking import read_metrics

EXACT = ("train/loss", "train/lr", "train/grad_norm", "val/loss")


def series(run_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run_dir / "metrics.jsonl") if name in line}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights byte for byte, optimizer, curves and stories."""
    for name in ("best", "last"):
        ours, theirs = (run / name / "model.safetensors" for run in (one, other))
        assert ours.read_bytes() == theirs.read_bytes(), name
    newest, newest_other = checkpoints(one)[-1], checkpoints(other)[-1]
    assert newest.name == newest_other.name
    optimizers = sorted(path.name for path in newest.glob("optimizer*.bin"))
    assert optimizers
    for name in optimizers:
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (newest, newest_other))
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    averages = [folder / AVERAGE for folder in (newest, newest_other)]
    if any(path.exists() for path in averages):
        assert averages[0].read_bytes() == averages[1].read_bytes()
    for name in EXACT:
        assert series(one, name) == series(other, name), name
    assert (one / "samples.md").read_text() == (other / "samples.md").read_text()


@contextmanager
def signalled(monkeypatch, stops: dict[int, signal.Signals]) -> Iterator[None]:
    """Each of `stops` is a signal to this very process at the beginning of that step, once."""
    waiting, train_step = dict(stops), loop.train_step

    def interrupted_step(run):
        if number := waiting.pop(run.progress.step + 1, None):
            os.kill(os.getpid(), number)
        return train_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted_step)
        yield


def train_in_pieces(config: RunConfig, monkeypatch, stops: dict[int, signal.Signals]) -> Path:
    with signalled(monkeypatch, stops):
        for step in stops:
            with pytest.raises(Stopped, match=rf"stopped after step {step} of \d+, saved"):
                train(config)
        return train(config)


@pytest.fixture
def two_epochs(tiny_run, tmp_path_factory):
    """As `tiny_run`, on 20 stories: an epoch is 43 steps, so a run of 60 crosses its edge."""
    folder = tmp_path_factory.mktemp("two_epochs")

    def configure(*flags: str, name: str) -> RunConfig:
        flags = ("--data.data_dir", str(folder), "--data.max_stories", "20", *flags)
        return tiny_run("--train.max_steps", "60", "--train.eval_every", "20", *flags, name=name)

    return configure


VARIANTS = {
    "fp32, dropout, accumulation": (
        *("--model.dropout", "0.2", "--train.per_device_batch_size", "2"),
        *("--train.log_every", "7", "--train.save_every", "9"),
    ),
    "bf16, Muon, story windows": (
        *("--train.mixed_precision", "bf16", "--train.optimizer", "muon", "--data.windows", "story"),
        *("--model.family", "modern", "--model.qk_norm", "true", "--model.dropout", "0.1"),
    ),
    "averaged": (*("--train.ema_decay", "0.9", "--model.dropout", "0.1"), *("--train.save_every", "9")),
    "compiled": ("--train.compile", "true", "--model.dropout", "0.1"),
    "compiled, bf16": ("--train.compile", "true", "--train.mixed_precision", "bf16"),
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_stopped_anywhere_a_run_ends_the_same_to_the_bit(flags, two_epochs, monkeypatch, fault):
    if "--train.compile" in flags and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    whole = train(two_epochs(*flags, name="whole"))
    stops = {5: signal.SIGTERM, 30: signal.SIGUSR1, 47: signal.SIGINT}  # none is due to save or to log
    pieces = train_in_pieces(two_epochs(*flags, name="pieces"), monkeypatch, stops)

    assert_same_run(whole, pieces)
    fault(
        "SIGTERM, SIGUSR1 and SIGINT, one after the other, in the middle of a step",
        "each finishes the step, saves and exits with code 75; the resumed run is the same to the bit",
    )


def test_steps_of_the_session_before_do_not_count_for_the_speed_of_this_one(tiny_run, monkeypatch):
    monkeypatch.setattr(Stopwatch, "elapsed_s", lambda self: 2.0)
    run_dir = train_in_pieces(tiny_run("--train.log_every", "6"), monkeypatch, {5: signal.SIGTERM})

    # 8 x 32 tokens a step, in two seconds: step 6 alone, then steps 7 to 12.
    assert series(run_dir, "train/tokens_per_second") == {6: 128.0, 12: 768.0}


def test_killed_twenty_times_a_run_ends_the_same_to_the_bit(two_epochs, fault):
    flags = ("--model.dropout", "0.1", "--train.per_device_batch_size", "4", "--train.save_every", "3")
    flags += ("--train.max_steps", "150", "--train.log_every", "7")
    began_s = time.perf_counter()
    whole = train(two_epochs(*flags, name="whole"))
    step_s = (time.perf_counter() - began_s) / 150
    config = two_epochs(*flags, name="killed")
    # A server that has imported torch forks real processes in no time; each has a life of its own.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tinystories_slm.training"])
    rng, kills, in_the_middle_of_saving = random.Random(0), 0, 0
    while kills < 20:
        process = processes.Process(target=train, args=(config,))
        process.start()
        _wait_for_a_moment(process, config.output_dir, rng.uniform(0, 3 * step_s), mid_save=kills % 2 == 0)
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it reached its end before twenty kills"
        kills += 1
        in_the_middle_of_saving += any((config.output_dir / "checkpoints").glob("*.partial"))
    finished_steps = [int(folder.name.removeprefix("step_")) for folder in checkpoints(config.output_dir)]
    process = processes.Process(target=train, args=(config,))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert finished_steps and max(finished_steps) < 150  # the kills had a run to interrupt
    assert in_the_middle_of_saving >= 5
    assert_same_run(whole, config.output_dir)
    fault(
        f"SIGKILL at {kills} random moments, {in_the_middle_of_saving} of them in the middle of a checkpoint",
        "the same command goes on from the last whole checkpoint; the model is the same byte for byte",
    )


def _wait_for_a_moment(process, run_dir: Path, seconds: float, *, mid_save: bool) -> None:
    """Until the run writes a checkpoint, or has written one and `seconds` have passed."""
    folder = run_dir / "checkpoints"
    steps = [path.name for path in checkpoints(run_dir)]
    while process.is_alive():
        if mid_save and any(folder.glob("*.partial")):
            break
        if not mid_save and [path.name for path in checkpoints(run_dir)] != steps:
            time.sleep(seconds)
            break
        time.sleep(0.0005)


@pytest.mark.parametrize("first, then", [(1, 8), (8, 1)], ids=["1 to 8", "8 to 1"])
def test_resumed_in_other_micro_batches_losses_agree(first, then, tiny_run, monkeypatch):
    whole = train(tiny_run("--train.per_device_batch_size", str(8 // first), name="whole"))
    config = tiny_run("--train.per_device_batch_size", str(8 // first), name="mixed")
    other = tiny_run("--train.per_device_batch_size", str(8 // then), name="mixed")
    with pytest.raises(Stopped), signalled(monkeypatch, {6: signal.SIGTERM}):
        train(config)
    train(other)

    for name in EXACT:
        assert list(series(config.output_dir, name).values()) == pytest.approx(
            list(series(whole, name).values()), rel=2e-4
        ), name


def test_a_branch_goes_on_from_a_checkpoint_of_another_run(tiny_run):
    trunk = train(tiny_run("--train.keep_checkpoints", "3", name="trunk"))
    checkpoint = trunk / "checkpoints" / "step_000004"
    config = tiny_run("--train.resume", str(checkpoint), "--train.keep_checkpoints", "3", name="branch")
    branch = train(config)

    assert_same_run(trunk, branch)
    assert [folder.name for folder in checkpoints(branch)] == ["step_000008", "step_000012"]
    train(config)  # finished: nothing is done, nothing refused


def test_a_run_may_begin_with_another_models_weights(tiny_run):
    first = train(tiny_run(name="first"))
    config = tiny_run("--model.init_from", str(first / "best"), "--train.seed", "1", name="second")
    second = train(config)

    assert series(second, "train/loss")[1] < series(first, "train/loss")[1] - 0.3
    assert load_file(second / "last" / "model.safetensors").keys()

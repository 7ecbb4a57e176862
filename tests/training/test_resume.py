"""Resume: a stopped run gives the same model, bit for bit or within rounding."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from script_process import processes
from training.helpers import (
    EXACT_METRICS,
    assert_equal_tensors,
    assert_same_run,
    load_weights,
    read_series,
    send_signals,
    train_with_stops,
)

from tinystories_slm import grammar
from tinystories_slm.config import RunConfig
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.runs.console import Stopwatch
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.runs.run_dir import read_json_object
from tinystories_slm.training import is_finished, train
from tinystories_slm.training.checkpoints import (
    checkpoints,
)


@pytest.fixture
def two_epochs(tiny_run, tmp_path_factory):
    """`tiny_run` on 20 stories: an epoch has 43 steps, so a run of 60 steps enters the second."""
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
    "bf16, Muon, document packing": (
        *("--train.mixed_precision", "bf16", "--train.optimizer", "muon", "--data.packing", "document"),
        *("--model.family", "llama", "--model.qk_norm", "true", "--model.dropout", "0.1"),
    ),
    "EMA": (*("--train.ema_decay", "0.9", "--model.dropout", "0.1"), *("--train.save_every", "9")),
    "best fit, masked": (
        *("--data.packing", "best_fit", "--data.mask_across_stories", "true"),
        *("--model.family", "llama", "--train.per_device_batch_size", "2"),
    ),
    "compiled": ("--train.compile", "true", "--model.dropout", "0.1"),
    "compiled, bf16": ("--train.compile", "true", "--train.mixed_precision", "bf16"),
}


# Compilation takes a minute.
WEEKLY = {name: [pytest.mark.weekly] for name in ("compiled", "compiled, bf16")}


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, id=name, marks=WEEKLY.get(name, [])) for name, flags in VARIANTS.items()]
)
def test_run_stopped_by_signals_is_bit_identical(flags, two_epochs, monkeypatch, fault):
    if "--train.compile" in flags and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    whole = train(two_epochs(*flags, name="whole"))
    stops = {5: signal.SIGTERM, 30: signal.SIGUSR1, 47: signal.SIGINT}  # steps without a save or a log line
    pieces = train_with_stops(two_epochs(*flags, name="pieces"), monkeypatch, stops)

    assert_same_run(whole, pieces)
    if "--train.compile" in flags:  # not in the cache of all programs, which may hold another CPU's code
        assert any((ROOT / ".cache").glob("torchinductor-*/**/*.so"))
    fault(
        "SIGTERM, SIGUSR1 and SIGINT, one after the other, during a step",
        "the step finishes, a checkpoint is saved, exit code 75; the resumed run is bit-identical",
    )


def test_resumed_run_equals_an_uninterrupted_run(tiny_run):
    dropout = ("--model.dropout", "0.2", "--train.per_device_batch_size", "4")
    whole = train(tiny_run(*dropout, name="whole"))
    resumed = train(tiny_run(*dropout, name="resumed"))
    for folder in ("best", "last"):
        shutil.rmtree(resumed / folder)
    shutil.rmtree(resumed / "checkpoints" / "step_000012")  # as after a kill at step 8
    assert not is_finished(tiny_run(*dropout, name="resumed"))
    assert train(tiny_run(*dropout, name="resumed")) == resumed

    assert_equal_tensors(load_weights(resumed / "last"), load_weights(whole / "last"))
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        assert read_series(resumed, name) == read_series(whole, name)
    assert (resumed / "samples.md").read_text() == (whole / "samples.md").read_text()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.md"])
def test_kill_during_resume_loses_no_records(name, tiny_run, monkeypatch, fault):
    run_dir = train(tiny_run())
    before = {name: (run_dir / name).read_text() for name in ("config.yaml", "samples.md")}
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    write_text = Path.write_text

    def killed_write_text(path: Path, text: str, **options) -> int:
        if path.name.startswith(name):
            write_text(path, "", **options)
            raise SystemExit("killed")
        return write_text(path, text, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(Path, "write_text", killed_write_text)
        train(tiny_run())
    train(tiny_run())

    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {name: (run_dir / name).read_text() for name in before} == before
    fault(
        "SIGKILL while a resumed run rewrites its records",
        "the old or the new file exists, complete; the same command resumes",
    )


def test_truncated_token_file_raises_on_resume(data_dir, tiny_run, tmp_path, monkeypatch, fault):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    flags = ("--data.data_dir", str(folder))
    run_dir = train(tiny_run(*flags))
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    tokens = folder / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"train.bin"):
        train(tiny_run(*flags))
    fault("a token file is truncated between two sessions", "an error names the file (exit code 2)")


def test_steps_of_an_earlier_session_do_not_count_for_the_speed(tiny_run, monkeypatch):
    monkeypatch.setattr(Stopwatch, "elapsed_s", lambda self: 2.0)
    run_dir = train_with_stops(tiny_run("--train.log_every", "6"), monkeypatch, {5: signal.SIGTERM})

    # 8 x 32 tokens per step in two seconds: step 6 alone, then steps 7 to 12.
    assert read_series(run_dir, "train/tokens_per_second") == {6: 128.0, 12: 768.0}


def test_run_killed_twenty_times_is_bit_identical(two_epochs, fault):
    flags = ("--model.dropout", "0.1", "--train.per_device_batch_size", "4", "--train.save_every", "3")
    flags += ("--train.max_steps", "150", "--train.log_every", "7")
    start_s = time.perf_counter()
    whole = train(two_epochs(*flags, name="whole"))
    step_s = (time.perf_counter() - start_s) / 150
    config = two_epochs(*flags, name="killed")
    rng, kills, kills_during_a_save = random.Random(0), 0, 0
    while kills < 20:
        process = processes.Process(target=train, args=(config,))
        process.start()
        _wait_for_kill_time(process, config.output_dir, rng.uniform(0, 3 * step_s), mid_save=kills % 2 == 0)
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run finished before twenty kills"
        kills += 1
        kills_during_a_save += any((config.output_dir / "checkpoints").glob("*.partial"))
    finished_steps = [int(folder.name.removeprefix("step_")) for folder in checkpoints(config.output_dir)]
    process = processes.Process(target=train, args=(config,))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert finished_steps and max(finished_steps) < 150  # the run was not finished when killed
    assert kills_during_a_save >= 5
    assert_same_run(whole, config.output_dir)
    fault(
        f"SIGKILL at {kills} random moments, {kills_during_a_save} of them during a save",
        "the same command resumes the last complete checkpoint; the model is identical byte for byte",
    )


def _wait_for_kill_time(process, run_dir: Path, seconds: float, *, mid_save: bool) -> None:
    """Return when the run is writing a checkpoint, or `seconds` after it has written one."""
    folder = run_dir / "checkpoints"
    steps = [path.name for path in checkpoints(run_dir)]
    while process.is_alive():
        if mid_save and _is_saving(folder):
            break
        if not mid_save and [path.name for path in checkpoints(run_dir)] != steps:
            time.sleep(seconds)
            break
        time.sleep(0.0005)


def _is_saving(folder: Path) -> bool:
    try:
        return any(name.endswith(".partial") for name in os.listdir(folder))
    except FileNotFoundError:  # a run without a checkpoint starts over
        return False


def test_resume_with_another_accumulation_keeps_the_losses(tiny_run):
    # 12 sequences in 2 micro-batches, then in 3: this would break Accelerate's own count of micro-batches.
    batch = ("--train.batch_size", "12")
    whole = train(tiny_run(*batch, "--train.per_device_batch_size", "6", name="whole"))
    mixed = train(tiny_run(*batch, "--train.per_device_batch_size", "6", name="mixed"))
    for step in (8, 12):
        shutil.rmtree(mixed / "checkpoints" / f"step_{step:06d}")
    shutil.copytree(whole / "checkpoints" / "step_000008", mixed / "checkpoints" / "step_000008")
    train(tiny_run(*batch, "--train.per_device_batch_size", "4", name="mixed"))

    for name in ("train/loss", "train/grad_norm"):
        assert list(read_series(mixed, name).values()) == pytest.approx(
            list(read_series(whole, name).values()), rel=2e-4
        )


@pytest.mark.parametrize("first, then", [(1, 8), (8, 1)], ids=["1 to 8", "8 to 1"])
def test_resume_with_another_micro_batch_keeps_the_losses(first, then, tiny_run, monkeypatch):
    whole = train(tiny_run("--train.per_device_batch_size", str(8 // first), name="whole"))
    config = tiny_run("--train.per_device_batch_size", str(8 // first), name="mixed")
    other = tiny_run("--train.per_device_batch_size", str(8 // then), name="mixed")
    with pytest.raises(TrainingInterrupted), send_signals(monkeypatch, {6: signal.SIGTERM}):
        train(config)
    train(other)

    for name in EXACT_METRICS:
        assert list(read_series(config.output_dir, name).values()) == pytest.approx(
            list(read_series(whole, name).values()), rel=2e-4
        ), name


@pytest.mark.parametrize(
    "option", ["--train.cpu_kernels=torch", "--train.attention=eager"], ids=["cpu_kernels", "attention"]
)
def test_kernels_and_attention_may_change_on_resume(option, tiny_run, monkeypatch):
    whole = train(tiny_run(name="whole"))
    config = tiny_run(option, name="changed")
    with pytest.raises(TrainingInterrupted), send_signals(monkeypatch, {6: signal.SIGTERM}):
        train(config)
    train(tiny_run(name="changed"))

    expected = read_series(whole, "train/loss")
    assert read_series(config.output_dir, "train/loss") == pytest.approx(expected, rel=1e-3)


def test_branch_continues_a_checkpoint_of_another_run(tiny_run):
    trunk = train(tiny_run("--train.keep", "newest:3", name="trunk"))
    checkpoint = trunk / "checkpoints" / "step_000004"
    config = tiny_run("--train.resume", str(checkpoint), "--train.keep", "newest:3", name="branch")
    branch = train(config)

    assert_same_run(trunk, branch)
    assert [folder.name for folder in checkpoints(branch)] == ["step_000008", "step_000012"]
    train(config)  # already finished: no training, no error


def test_init_from_starts_with_the_weights_of_another_model(tiny_run):
    first = train(tiny_run(name="first"))
    config = tiny_run("--model.init_from", str(first / "best"), "--train.seed", "1", name="second")
    second = train(config)

    assert read_series(second, "train/loss")[1] < read_series(first, "train/loss")[1] - 0.3
    assert load_file(second / "last" / "model.safetensors").keys()


def test_saved_models_record_their_training_data_and_that_of_the_base_model(tiny_run):
    first = train(tiny_run(name="first"))
    config = tiny_run("--model.init_from", str(first / "best"), "--data.seq_len", "32", name="second")
    second = train(config)
    shutil.rmtree(second / "checkpoints" / "step_000012")
    shutil.rmtree(first)  # a resumed run keeps its record without the base model
    train(config)

    data = {
        "source": "builtin", "revision": f"grammar {grammar.VERSION}", "validation_split": "auto",
        "validation_fraction": 0.05, "max_stories": 300, "subset": None, "cleaning": [], "num_parts": 1,
    }  # fmt: skip
    for name in ("best", "last"):
        saved = read_json_object(second / name / "config.json")
        assert saved["training_data"] == [data, data], name
        assert saved["training_step"] == 12

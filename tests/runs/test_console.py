import io
import logging
from types import SimpleNamespace

import pytest
import torch

from tinystories_slm.data.token_files import Manifest
from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.io.units import format_bytes, format_duration, format_flops
from tinystories_slm.model_costs import num_parameters
from tinystories_slm.runs import console
from tinystories_slm.runs.console import ProgressDisplay
from tinystories_slm.training.run_plan import log_run_plan
from tinystories_slm.training.runtime import resolve_runtime

METRICS = {"train/loss": 1.5, "train/tokens_per_second": 12345.6, "train/mfu": 0.314}


@pytest.fixture
def clock(monkeypatch):
    """Clock of the display; a test sets `clock.s`."""
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock.s)
    return clock


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="tinystories_slm")
    return lambda: caplog.messages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_steps(display: ProgressDisplay, clock, *, steps: range, step_seconds: float) -> None:
    for step in steps:
        clock.s += step_seconds
        display.advance()
        if step % 10 == 0:
            display.show(step, METRICS)


def test_display_logs_lines_without_a_terminal(clock, lines, capsys):
    display = ProgressDisplay(1000, first_step=0, enabled=True)
    run_steps(display, clock, steps=range(1, 1001), step_seconds=0.2)
    display.close()

    assert capsys.readouterr().err == ""  # no bar
    progress = [line for line in lines() if line.startswith("step")]
    assert progress[0] == "step 30/1000: loss 1.500, 12,346 tokens/s, MFU 31.4%, 3 min left"
    assert progress[-1] == "step 1000/1000: loss 1.500, 12,346 tokens/s, MFU 31.4%"
    assert len(progress) < 40  # of 100 calls


def test_long_run_logs_fewer_lines(clock, lines):
    display = ProgressDisplay(100_000, first_step=0, enabled=True)
    run_steps(display, clock, steps=range(1, 100_001), step_seconds=1.0)  # more than a day
    assert len(lines()) < 500


def test_eta_is_logged_once_and_excludes_warm_up(clock, lines):
    display = ProgressDisplay(1000, first_step=400, enabled=True)
    clock.s += 500  # compiling
    run_steps(display, clock, steps=range(401, 1001), step_seconds=1.0)
    etas = [line for line in lines() if line.startswith("time:")]
    assert etas == ["time: about 10 min left, from the throughput of the last 10 steps"]


def test_eta_ends_at_the_time_limit(clock, lines):
    display = ProgressDisplay(100_000, first_step=0, enabled=True, end_s=clock.s + 600)
    run_steps(display, clock, steps=range(1, 101), step_seconds=1.0)
    [eta] = [line for line in lines() if line.startswith("time:")]
    assert eta.startswith("time: about 10 min left") or eta.startswith("time: about 9 min left")


def test_display_shows_a_bar_on_a_terminal(clock, lines, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(console.sys, "stderr", screen)
    display = ProgressDisplay(100, first_step=0, enabled=True)
    run_steps(display, clock, steps=range(1, 101), step_seconds=1.0)
    display.close()
    assert "loss 1.500, 12,346 tokens/s, MFU 31.4%" in screen.getvalue()
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("100/100 ") and len(last) < 80
    assert not [line for line in lines() if line.startswith("step")]


def test_disabled_display_shows_nothing(clock, lines, capsys):
    display = ProgressDisplay(100, first_step=0, enabled=False)
    run_steps(display, clock, steps=range(1, 101), step_seconds=1.0)
    display.show(100, {"val/loss": 1.0, "val/perplexity": 2.7})
    assert not lines() and capsys.readouterr().err == ""


def test_run_plan_is_logged_at_the_start(tiny_run, data_dir, lines):
    config = tiny_run("--train.per_device_batch_size", "4")
    manifest = Manifest.load(data_dir / "manifest.json")
    model_config = config.model_config(vocab_size=300)
    accelerator = SimpleNamespace(
        num_processes=1, device=torch.device("cpu"), mixed_precision="no", gradient_accumulation_steps=2
    )
    settings = resolve_runtime(config, torch.device("cpu"))
    log_run_plan(config, accelerator, settings, model_config, manifest, PeakFlops(1e6, "made up"), step=4)

    model, length, learning_rate, processes, runtime, estimate, peak = lines()
    assert model.startswith(f"model: {num_parameters(model_config):,} parameters (")
    assert length.startswith("run: 12 steps of 8 x 32 = 256 tokens, 3,072 in total, 0.0 epochs of the ")
    assert processes == "processes: 1 on cpu, mixed precision no, 2 micro-batches per step; resumed at step 4"
    assert learning_rate == "learning rate: peak 0.01; adamw, cosine to 0.001"
    assert runtime.startswith("runtime: micro-batch 4, matmul attention, ")
    assert estimate.startswith("estimate: about 614 kB of memory per process (154 kB for logits)")
    # 8 steps are left, and 77,952 operations for each of their 2,048 tokens take 160 s at 10^6 a second.
    assert peak == (
        "peak: 0.001 GFLOP/s per process (made up); run time at least 3 min for 77,952 FLOP per token; "
        "ETA after 20 steps"
    )


def test_quantities_are_formatted_with_units():
    assert [format_bytes(n) for n in (0, 2500, 99_949_999, 999_600_000, 3.21e9, 4.5e12)] == [
        "0.0 kB", "2.5 kB", "100 MB", "1.0 GB", "3.2 GB", "4,500 GB",
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 12.4, 59.9, 100, 3599, 3600, 11_100)] == [
        "1 s", "12 s", "1 min", "2 min", "1 h 00 min", "1 h 00 min", "3 h 05 min",
    ]  # fmt: skip
    assert [format_flops(n) for n in (4.5e11, 9.8e11, 9.999e11, 3.12e14, 1.3074e15)] == [
        "450 GFLOP/s", "980 GFLOP/s", "1 TFLOP/s", "312 TFLOP/s", "1,307 TFLOP/s",
    ]  # fmt: skip

import io
import logging
from types import SimpleNamespace

import pytest
import torch

from tinystories_slm.data.prepare import Manifest
from tinystories_slm.training.settings import resolve_settings
from tinystories_slm.training.watching import display
from tinystories_slm.training.watching.display import Display, announce, in_bytes, in_flops, in_time
from tinystories_slm.training.watching.estimate import Peak, num_parameters

METRICS = {"train/loss": 1.5, "train/tokens_per_second": 12345.6, "train/mfu": 0.314}


@pytest.fixture
def clock(monkeypatch):
    """`clock.s` is what the display takes for the time."""
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr(display.time, "perf_counter", lambda: clock.s)
    return clock


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="tinystories_slm")
    return lambda: caplog.messages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(shown: Display, clock, *, steps: range, seconds_a_step: float) -> None:
    for step in steps:
        clock.s += seconds_a_step
        shown.advance()
        if step % 10 == 0:
            shown.show(step, METRICS)


def test_off_a_terminal_it_is_a_line_now_and_then(clock, lines, capsys):
    shown = Display(1000, first_step=0, shown=True)
    run(shown, clock, steps=range(1, 1001), seconds_a_step=0.2)
    shown.close()

    assert capsys.readouterr().err == ""  # no bar
    progress = [line for line in lines() if line.startswith("step")]
    assert progress[0] == "step 30/1000: loss 1.500, 12,346 tokens/s, MFU 31.4%, 3 min left"
    assert progress[-1] == "step 1000/1000: loss 1.500, 12,346 tokens/s, MFU 31.4%"
    assert len(progress) < 40  # of 100 logged


def test_a_long_run_does_not_write_lines_without_end(clock, lines):
    shown = Display(100_000, first_step=0, shown=True)
    run(shown, clock, steps=range(1, 100_001), seconds_a_step=1.0)  # more than a day
    assert len(lines()) < 500


def test_the_time_is_told_once_after_twenty_steps_and_does_not_count_the_warming_up(clock, lines):
    shown = Display(1000, first_step=400, shown=True)
    clock.s += 500  # compiling
    run(shown, clock, steps=range(401, 1001), seconds_a_step=1.0)
    told = [line for line in lines() if line.startswith("time:")]
    assert told == ["time: about 10 min from here, by the pace of the last 10 steps"]


def test_on_a_terminal_it_is_a_bar(clock, lines, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(display.sys, "stderr", screen)
    shown = Display(100, first_step=0, shown=True)
    run(shown, clock, steps=range(1, 101), seconds_a_step=1.0)
    shown.close()
    assert "loss 1.500, 12,346 tokens/s, MFU 31.4%" in screen.getvalue()
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("100/100 ") and len(last) < 80
    assert not [line for line in lines() if line.startswith("step")]


def test_the_other_processes_show_nothing(clock, lines, capsys):
    shown = Display(100, first_step=0, shown=False)
    run(shown, clock, steps=range(1, 101), seconds_a_step=1.0)
    shown.show(100, {"val/loss": 1.0, "val/perplexity": 2.7})
    assert not lines() and capsys.readouterr().err == ""


def test_at_the_start_the_arithmetic_is_done(tiny_run, data_dir, lines):
    config = tiny_run("--train.per_device_batch_size", "4")
    manifest = Manifest.load(data_dir / "manifest.json")
    model_config = config.model_config(vocab_size=300)
    accelerator = SimpleNamespace(
        num_processes=1, device=torch.device("cpu"), mixed_precision="no", gradient_accumulation_steps=2
    )
    settings = resolve_settings(config, torch.device("cpu"))
    announce(config, accelerator, settings, model_config, manifest, Peak(1e6, "made up"), step=4)

    model, arithmetic, learning_rate, where, settings, needs, peak = lines()
    assert model.startswith(f"model: {num_parameters(model_config):,} parameters (")
    assert arithmetic.startswith("run: 12 steps of 8 x 32 = 256 tokens, 3,072 in all, 0.0 epochs of the ")
    assert where == "on: 1 process, cpu, mixed precision no, 2 micro-batches a step; resumed at step 4"
    assert learning_rate == "learning rate: 0.01 at its peak; adamw, cosine to 0.001"
    assert settings.startswith("with: 4 sequences at once, matmul attention, ")
    assert needs.startswith("needs: about 614 kB of memory a process (154 kB of them logits)")
    # 8 steps are left, and 77,952 operations for each of their 2,048 tokens take 160 s at 10^6 a second.
    assert peak == (
        "peak: 0.001 GFLOP/s a process (made up); at it, 77,952 FLOP a token take 3 min in all; the real "
        "time after 20 steps"
    )


def test_quantities_read_as_people_say_them():
    assert [in_bytes(n) for n in (0, 2500, 99_949_999, 999_600_000, 3.21e9, 4.5e12)] == [
        "0.0 kB", "2.5 kB", "100 MB", "1.0 GB", "3.2 GB", "4,500 GB",
    ]  # fmt: skip
    assert [in_time(s) for s in (0, 12.4, 59.9, 100, 3599, 3600, 11_100)] == [
        "1 s", "12 s", "1 min", "2 min", "1 h 00 min", "1 h 00 min", "3 h 05 min",
    ]  # fmt: skip
    assert [in_flops(n) for n in (4.5e11, 9.8e11, 9.999e11, 3.12e14, 1.3074e15)] == [
        "450 GFLOP/s", "980 GFLOP/s", "1 TFLOP/s", "312 TFLOP/s", "1,307 TFLOP/s",
    ]  # fmt: skip

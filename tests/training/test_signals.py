"""Stop signals: Ctrl-C once and twice, with a closed log pipe, and a terminal that closes."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, started
from training.helpers import assert_same_run, send_signals, train_with_stops

from tinystories_slm.config import save_config
from tinystories_slm.errors import TrainingInterrupted
from tinystories_slm.training import signals, train
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.signals import StopRequest

# The second step lasts until the first signal; with FOR_EVER, until the second.
WAITING_STEP = """
import os, time
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def waiting_step(run):
    while run.progress.step == 1 and (run.stop.received is None or "FOR_EVER" in os.environ):
        time.sleep(0.01)
    return train_step(run)

loop.train_step = waiting_step
run_command(loop.train, RunConfig, is_distributed=True)
"""

# Standard input becomes the controlling terminal, whose processes get SIGHUP when its other end is closed.
CONTROLLING_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_first_ctrl_c_saves_and_second_stops_immediately(tiny_run, tmp_path, fault):
    save_config(tiny_run(), tmp_path / "config.yaml")
    (tmp_path / "waits.py").write_text(WAITING_STEP)
    codes = {}
    for times in (1, 2):
        output_dir = tmp_path / f"run{times}"
        command = [sys.executable, tmp_path / "waits.py", "--config", tmp_path / "config.yaml"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"FOR_EVER": "1"} if times == 2 else {})
        options = {"env": environment, "stderr": subprocess.PIPE, "text": True}
        metrics = output_dir / "metrics.jsonl"
        with started([*command, f"--output_dir={output_dir}"], **options) as process:
            while not metrics.exists() or not metrics.read_text():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            if times == 2:
                time.sleep(1.2)  # an earlier signal counts as the same Ctrl-C, forwarded by a launcher
                process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=100)[1]
        codes[times] = process.returncode
        assert "SIGINT: finishing the step, then saving" in stderr
        assert "Traceback" not in stderr
        assert [folder.name for folder in checkpoints(output_dir)] == ["step_000002"][: 2 - times]

    assert codes == {1: 75, 2: 130}
    fault("Ctrl-C", "the step finishes, a checkpoint is saved: exit code 75")
    fault("Ctrl-C twice", "immediate stop: exit code 130; earlier checkpoints are intact")


def test_closed_log_pipe_does_not_end_the_run(tiny_run, tmp_path, fault):
    flags = ("--train.max_steps", "100000", "--train.save_every", "100000", "--train.eval_every", "20")
    config = tiny_run(*flags)
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", tmp_path / "config.yaml"]
    with started(command, stderr=subprocess.PIPE) as process:
        metrics = config.output_dir / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.stderr.close()
        evaluations = metrics.read_text().count("val/loss")
        while metrics.read_text().count("val/loss") < evaluations + 2:  # each writes to the closed pipe
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 75
    assert len(checkpoints(config.output_dir)) == 1
    fault(
        "the reader of the log exits, then Ctrl-C (`| tee` in a terminal)",
        "the run continues without a log; the step finishes, a checkpoint is saved: exit code 75",
    )


def test_sigusr2_and_sigxcpu_save_as_sigterm_does(tiny_run, monkeypatch, fault):
    stops = {3: signal.SIGUSR2, 6: signal.SIGXCPU}  # steps without a save
    assert_same_run(train_with_stops(tiny_run(), monkeypatch, stops), train(tiny_run(name="whole")))
    fault(
        "SIGUSR2 and SIGXCPU (a limit of CPU time) during a step",
        "the step finishes, a checkpoint is saved, exit code 75; the resumed run is bit-identical",
    )


def test_sighup_saves_and_the_run_goes_on_or_stops(tiny_run, monkeypatch, capfd):
    flags = ("--train.keep", "newest:9")
    with send_signals(monkeypatch, {3: signal.SIGHUP, 7: signal.SIGHUP}):
        goes_on = train(tiny_run(*flags))
    assert [int(path.name[5:]) for path in checkpoints(goes_on)] == [3, 4, 7, 8, 12]
    assert capfd.readouterr().err.count("SIGHUP: finishing the step, then saving; the run goes on") == 2

    config = tiny_run(*flags, "--train.on_hangup", "stop", name="stops")
    with (
        pytest.raises(TrainingInterrupted, match="step 3 of 12"),
        send_signals(monkeypatch, {3: signal.SIGHUP}),
    ):
        train(config)
    assert [int(path.name[5:]) for path in checkpoints(config.output_dir)] == [3]
    assert_same_run(train(tiny_run(*flags, name="stops")), goes_on)  # the option may change on resume


def test_stop_signals_are_those_that_the_platform_has(monkeypatch):
    for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"):  # Windows has none of them
        monkeypatch.delattr(signals.signal, name)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM" and not stop.hung_up


def test_program_that_ignores_sighup_keeps_ignoring_it():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest(stop_on_hangup=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None and not stop.hung_up
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_closed_terminal_does_not_end_the_run(tiny_run, tmp_path, fault):
    config = tiny_run("--train.max_steps", "400", "--train.eval_every", "400", "--train.save_every", "400")
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", tmp_path / "config.yaml"]
    terminal, its_end = pty.openpty()
    options = {"stdin": its_end, "stdout": its_end, "stderr": its_end}
    with started([sys.executable, "-c", CONTROLLING_TERMINAL, *command], **options) as process:
        os.close(its_end)
        metrics = config.output_dir / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        os.close(terminal)
        assert process.wait(timeout=100) == 0
    steps = [int(path.name[5:]) for path in checkpoints(config.output_dir)]
    assert len(steps) == 2 and 0 < steps[0] < steps[1] == 400
    fault(
        "the terminal is closed during a step (SIGHUP)",
        "a checkpoint is saved and the run goes on to its end; with `train.on_hangup: stop`, exit code 75",
    )

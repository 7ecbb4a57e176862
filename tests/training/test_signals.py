"""Stop signals: Ctrl-C once and twice, and with a closed log pipe."""

import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, started

from tinystories_slm.config import save_config
from tinystories_slm.training.checkpoints import checkpoints

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

import json
import logging
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinystories_slm.config import save_config
from tinystories_slm.errors import UserError
from tinystories_slm.runs.recorder import RunRecorder
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.runs.trackers import Tracker, tracker_options
from tinystories_slm.training import train


def scalars(run_dir, name) -> list[tuple[int, float]]:
    """Return (step, value) as TensorBoard reads them."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def run_session(config, *, step: int, to: int) -> RunRecorder:
    """Log the steps after `step` to `to` with loss 1 / step; the recorder stays open."""
    accelerator = Accelerator(**tracker_options(config))
    config.output_dir.mkdir(exist_ok=True)
    recorder = RunRecorder(config.output_dir, step=step, tracker=Tracker(accelerator, config, step=step))
    for now in range(step + 1, to + 1):
        recorder.log({"train/loss": 1 / now}, step=now, tokens=now * 10)
    return recorder


def test_tensorboard_receives_the_lines_of_metrics_jsonl(tiny_run):
    run_dir = train(tiny_run("--train.tracker", "tensorboard", "--train.max_steps", "4"))
    lines = read_metrics(run_dir / "metrics.jsonl")
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/mfu", "val/loss", "tokens"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        seen = dict(scalars(run_dir, name))
        assert seen == pytest.approx(dict(logged), rel=1e-6) and len(seen) >= 1, name
    hparams = next((run_dir / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "train.lr: 0.01" in hparams and "model.family: gpt" in hparams


def test_resumed_run_logs_no_step_twice(tiny_run):
    config = tiny_run("--train.tracker", "tensorboard")
    run_session(config, step=0, to=7)  # killed three steps after the checkpoint of step 4
    run_session(config, step=4, to=9).close()
    assert scalars(config.output_dir, "train/loss") == [
        (step, pytest.approx(1 / step)) for step in range(1, 10)
    ]
    assert [line["step"] for line in read_metrics(config.output_dir / "metrics.jsonl")] == [*range(1, 10)]


def test_tracker_enabled_on_resume_gets_earlier_lines(tiny_run):
    run_session(tiny_run(), step=0, to=7)
    run_session(tiny_run("--train.tracker", "tensorboard"), step=4, to=6).close()
    seen = scalars(tiny_run().output_dir, "train/loss")
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]


def test_new_run_hides_the_events_of_the_previous_one(tiny_run):
    config = tiny_run("--train.tracker", "tensorboard")
    run_session(config, step=0, to=9).close()
    (config.output_dir / "metrics.jsonl").unlink()
    run_session(config, step=0, to=3).close()
    assert [step for step, _ in scalars(config.output_dir, "train/loss")] == [1, 2, 3]


# In a new process: trackio reads TRACKIO_DIR once, when it is imported.
_TRACKIO_SESSIONS = """
import sys
from accelerate import Accelerator
from tinystories_slm.config import load_config
from pathlib import Path
from tinystories_slm.runs.trackers import Tracker, tracker_options
from tinystories_slm.runs.recorder import RunRecorder
config = load_config(Path(sys.argv[1]))
for step, to in ((0, 7), (4, 9)):
    accelerator = Accelerator(**tracker_options(config))
    recorder = RunRecorder(config.output_dir, step=step, tracker=Tracker(accelerator, config, step=step))
    for now in range(step + 1, to + 1):
        recorder.log({"train/loss": 1 / now}, step=now, tokens=now * 10)
    recorder.close()
"""


def test_trackio_keeps_one_run_in_the_run_directory(tiny_run, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    config = tiny_run("--train.tracker", "trackio")
    config.output_dir.mkdir()
    save_config(config, config.output_dir / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", _TRACKIO_SESSIONS, str(config.output_dir / "config.yaml")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trackio show" not in done.stdout  # it lacks the directory; our log line has it

    [database] = (config.output_dir / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
        [(stored,)] = connection.execute("select config from configs").fetchall()
    [name] = {name for name, _, _ in rows}
    assert name.startswith("run-")
    assert [step for _, step, _ in rows] == [*range(1, 10)]
    assert [json.loads(metrics)["train/loss"] for *_, metrics in rows] == [1 / n for n in range(1, 10)]
    assert json.loads(stored)["train.tracker"] == "trackio"


def test_missing_tracker_package_is_rejected_before_training(tiny_run, monkeypatch):
    monkeypatch.setattr("tinystories_slm.runs.trackers.get_available_trackers", list)
    config = tiny_run("--train.tracker", "trackio")
    with pytest.raises(UserError, match=r"train.tracker \(trackio\).*pip install 'tinystories_slm\[track\]'"):
        train(config)
    with pytest.raises(UserError, match=r"train.tracker \(wandb\) is not installed; pip install wandb"):
        train(tiny_run("--train.tracker", "wandb"))
    assert not config.output_dir.exists()


class FailingTracker:
    """A tracker that fails in the method `at`, as without a network."""

    name = "tensorboard"

    def __init__(self, at: str):
        self.at, self.calls = at, 0

    def __call__(self, *args, **kwargs):
        return self

    def start(self):
        self._fail("start")
        self.run = self

    def store_init_configuration(self, values):
        self._fail("config")

    def log(self, values, step, **kwargs):
        self.calls += 1
        self._fail("log")

    def finish(self):
        assert self.run  # like W&B: it exists only after `start`
        self._fail("finish")

    requires_logging_directory = False

    def _fail(self, where: str) -> None:
        if where == self.at:
            raise ConnectionError("no\nresponse")


@pytest.mark.parametrize("at", ["start", "config", "log", "finish"])
def test_failing_tracker_logs_one_warning_and_training_continues(tiny_run, monkeypatch, caplog, at):
    failing = FailingTracker(at)
    monkeypatch.setitem(
        sys.modules["accelerate.accelerator"].__dict__["LOGGER_TYPE_TO_CLASS"], "tensorboard", failing
    )
    run_dir = train(tiny_run("--train.tracker", "tensorboard", "--train.max_steps", "4"))
    warnings = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "tracker" in r.name
    ]
    assert len(warnings) == 1 and "ConnectionError: no response" in warnings[0]
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 5
    assert failing.calls == (0 if at in ("start", "config") else 5)


def test_other_processes_do_not_log(tiny_run):
    config = tiny_run("--train.tracker", "tensorboard")
    tracker = Tracker(SimpleNamespace(is_main_process=False), config, step=0)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.close()
    assert not config.output_dir.exists()

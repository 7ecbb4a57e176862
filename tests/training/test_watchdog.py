"""A process that stops, hangs or dies in a launch of two: who is named, and how the launch ends."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from training.helpers import start_two_processes

from tinystories_slm.config import save_config
from tinystories_slm.training.checkpoints import checkpoint_step, checkpoints
from tinystories_slm.training.watchdog import Heartbeat, StallDetector, Watchdog

# The second process does ACTION at its seventh step.
FAULT = """
import os, signal, time
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def wait_for_ever():
    while True:
        time.sleep(1)

def faulty_step(run):
    if run.progress.step == 6 and os.environ["RANK"] == "1":
        ACTION
    return train_step(run)

loop.train_step = faulty_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


def beat(num_beats: int, num_advances: int, *, is_paused: bool = False) -> Heartbeat:
    return Heartbeat(num_beats, num_advances, step=num_advances, is_paused=is_paused, host="n1", pid=7)


def test_detector_names_a_silent_process_after_the_timeout():
    detector = StallDetector(timeout_s=60)
    for second in range(61):
        stalled = detector.update({0: beat(second, second), 1: beat(min(second, 10), 10)}, second)
        assert not stalled
    for second in range(61, 71):
        stalled = detector.update({0: beat(second, 60), 1: beat(10, 10)}, second)
    assert stalled == [1]
    assert detector.message([1]).startswith(
        "no progress for 60 s: waiting for process 1 on n1 (pid 7) at step 10; the run ends"
    )


def test_detector_names_the_process_that_the_others_wait_for():
    detector = StallDetector(timeout_s=60)
    beats = {0: beat(0, 8), 1: beat(0, 7), 2: beat(0, 8)}
    found = {}
    for second in range(0, 62):
        found[second] = detector.update(
            {rank: each._replace(num_beats=second) for rank, each in beats.items()}, second
        )
    assert found[59] == [] and found[60] == [1]


def test_detector_ignores_evaluation_and_saving():
    detector = StallDetector(timeout_s=60)
    for second in range(0, 600):
        assert not detector.update({0: beat(second, 8, is_paused=True), 1: beat(second, 8)}, second)
    for second in range(600, 659):
        assert not detector.update({0: beat(second, 8), 1: beat(second, 8)}, second)
    assert detector.update({0: beat(660, 8), 1: beat(660, 8)}, 660) == [0, 1]


def test_detector_starts_anew_after_it_was_stopped_itself():
    detector = StallDetector(timeout_s=60)
    detector.update({0: beat(1, 1), 1: beat(1, 1)}, 0)
    assert not detector.update({0: beat(2, 1), 1: beat(1, 1)}, 3_600)
    assert not detector.update({0: beat(3, 1), 1: beat(2, 1)}, 3_620)


@pytest.fixture
def run_with(tiny_run, tmp_path):
    """Return a function that trains in two processes, of which the second does `action`."""

    def run(action: str) -> tuple[list[int], list[str], list[int]]:
        config = tiny_run("--train.per_device_batch_size", "4", "--train.timeout_s", "8")
        save_config(config, tmp_path / "config.yaml")
        script: Path = tmp_path / "fault.py"
        script.write_text(FAULT.replace("ACTION", action))
        processes = start_two_processes(["--config", "config.yaml"], tmp_path, program=script)
        try:
            first = processes[0].communicate(timeout=240)[1]
            if processes[1].poll() is None and "SIGSTOP" in action:
                processes[1].send_signal(signal.SIGKILL)
            second = processes[1].communicate(timeout=60)[1]
        finally:
            for process in processes:
                process.kill()
        saved = [checkpoint_step(folder) for folder in checkpoints(config.output_dir)]
        return [process.returncode for process in processes], [first, second], saved

    return run


def test_a_stopped_process_is_named(run_with, fault):
    codes, errors, saved = run_with("os.kill(os.getpid(), signal.SIGSTOP)")
    assert codes == [69, -signal.SIGKILL] and saved == [4], errors
    assert errors[0].count("no progress for 8 s: waiting for process 1 on ") == 1
    # Its last heartbeat may be from before the sixth step.
    assert re.search(r"at step \d; the run ends", errors[0]) and "Traceback" not in errors[0]
    fault(
        "SIGSTOP to one of two processes",
        "after train.timeout_s the others name it and its step, and the launch ends with 69",
    )


def test_a_hanging_process_is_named_and_prints_its_stacks(run_with, fault):
    codes, errors, saved = run_with("wait_for_ever()")
    assert codes == [69, 69] and saved == [4], errors
    assert errors[0].count("no progress for 8 s: waiting for process 1 on ") == 1
    assert "no progress" not in errors[1] and "in wait_for_ever" in errors[1]
    fault(
        "one of two processes hangs",
        "after train.timeout_s it is named with its step, it prints its stacks, and the launch ends with 69",
    )


def test_a_killed_process_ends_the_others_with_one_line(run_with, fault):
    codes, errors, saved = run_with("os.kill(os.getpid(), signal.SIGKILL)")
    assert codes == [69, -signal.SIGKILL] and saved == [4], errors
    assert "error: another process of the launch is lost: " in errors[0] and "Traceback" not in errors[0]
    fault(
        "SIGKILL to one of two processes without a launcher",
        "the other ends with one line and exit code 69; the newest checkpoint is intact",
    )


def test_waiting_for_a_stream_is_published_as_a_pause():
    published = []
    watchdog = Watchdog(60, lambda: False)
    watchdog._store = SimpleNamespace(set=lambda key, text: published.append(Heartbeat(*json.loads(text))))
    for step in (0, 1):
        watchdog.advance(step)
        watchdog._publish(step)
    with watchdog.paused():
        watchdog._publish(2)
    watchdog._publish(3)
    # The first step, which may compile, is a pause as well.
    assert [beat.is_paused for beat in published] == [True, False, True, False]


@pytest.mark.parametrize("is_lost", [False, True], ids=["blocked", "lost"])
@pytest.mark.parametrize(
    ("rank", "size", "has_line"),
    [(1, 2, True), (8, 16, True), (9, 16, False)],
    ids=["second process", "first of the second host", "another of the second host"],
)
def test_a_store_that_does_not_answer_ends_the_process(monkeypatch, capfd, is_lost, rank, size, has_line):
    """As on a host that is cut off from that of the first process, or after the first process has ended."""
    ended, num_calls = threading.Event(), []
    beats = [[0, 0, 5, False, f"host{each // 8}", 7 + each] for each in range(size)]
    launch = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % 8, "MASTER_ADDR": "host0"}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))

    def multi_get(keys):
        num_calls.append(len(keys))
        if len(num_calls) > 3:
            if is_lost:
                raise RuntimeError("Connection reset by peer")
            ended.wait(60)
        return [json.dumps([len(num_calls), len(num_calls), *beat[2:]]) for beat in beats]

    def end(code):
        codes.append(code)
        ended.set()
        watchdog._stop.set()

    codes = []
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("tinystories_slm.training.watchdog._GRACE_S", 0)
    watchdog = Watchdog(0.4, lambda: False)
    watchdog._rank, watchdog._world_size = rank, size
    watchdog._store = SimpleNamespace(set=lambda key, text: None, multi_get=multi_get)
    threading.Thread(target=watchdog._exchange_heartbeats, daemon=True).start()
    watchdog._watch()
    assert codes == [69] and num_calls == [size] * 4
    line = "waiting for process 0 on host0 (pid 7) at step 5; the run ends"
    assert (line in capfd.readouterr().err) == has_line

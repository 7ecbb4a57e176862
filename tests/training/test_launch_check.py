"""A launch whose processes do not meet, or do not agree: one line, before anything is written."""

import logging
import socket

import pytest
from training.helpers import start_two_processes

from tinystories_slm.config import save_config
from tinystories_slm.errors import UserError
from tinystories_slm.training import launch_check
from tinystories_slm.training.launch_check import check_first_host, report_waiting

# The second process has another version of torch and another learning rate.
OTHER_VERSION = """
import os
from dataclasses import replace
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import launch_check, train

versions = launch_check.package_versions

def other_versions():
    return versions() | ({"torch": "0.1"} if os.environ["RANK"] == "1" else {})

def train_with_other_rate(config):
    if os.environ["RANK"] == "1":
        config = replace(config, train=replace(config.train, lr=0.5))
    train(config)

launch_check.package_versions = other_versions
run_command(train_with_other_rate, RunConfig, is_distributed=True)
"""


@pytest.fixture
def second_process(monkeypatch):
    """Make this process the second of two, whose first one is expected at the returned port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch_check, "_CONNECT_S", 0.0)
    return port


def test_first_host_that_refuses_a_connection_answers(second_process):
    check_first_host()  # its process has not started


def test_unknown_or_silent_first_host_raises(second_process, monkeypatch):
    monkeypatch.setattr(launch_check.time, "sleep", lambda seconds: None)

    def fail(address, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(
        UserError, match=r"MASTER_ADDR \(127.0.0.1\), port \d+: does not answer \(timed out\)"
    ):
        check_first_host()
    monkeypatch.setenv("RANK", "0")
    check_first_host()


def test_first_process_logs_that_it_waits(second_process, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch_check, "_REPORT_S", 0.05)
    with caplog.at_level(logging.WARNING), report_waiting():
        launch_check.time.sleep(0.5)
    assert (
        f"waiting for the other processes of this launch, 2 in all, at 127.0.0.1:{second_process}"
        in caplog.text
    )


def test_processes_of_different_versions_end_with_one_line(tiny_run, tmp_path, fault):
    save_config(tiny_run("--train.per_device_batch_size", "4"), tmp_path / "config.yaml")
    script = tmp_path / "other_version.py"
    script.write_text(OTHER_VERSION)
    processes = start_two_processes(["--config", "config.yaml"], tmp_path, program=script)
    errors = [process.communicate(timeout=240)[1] for process in processes]

    assert [process.returncode for process in processes] == [2, 2], errors
    assert "error: process 1 on " in errors[0]
    for name in ("train.lr (0.5)", "torch (0.1)"):
        assert f"{name} differs from that of process 0 (" in errors[0]
    assert "Traceback" not in errors[0] and "error" not in errors[1]
    assert not (tmp_path / "run").exists()
    fault(
        "a process of a launch has another version of torch",
        "one line names the process, its host and both versions, before anything is written (exit code 2)",
    )

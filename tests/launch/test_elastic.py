"""Elastic: torchrun with a range of nodes, one of which is lost and replaced, on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from training.helpers import read_series

from tinystories_slm.config import save_config
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import train

# The first node waits at step 10 until the second is lost. Alone, it waits at step 14 until another joins:
# torchrun then sends SIGTERM.
PROGRAM = """
import os, time
from pathlib import Path
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step
folder, is_alone = Path(__file__).parent, os.environ["WORLD_SIZE"] == "1"

def gated_step(run):
    step = run.progress.step
    if os.environ["RANK"] == "0":
        (folder / "step").write_text(f"{step} {os.environ['WORLD_SIZE']}")
        while step == 10 and not (folder / "lost").exists():
            time.sleep(0.05)
        while step == 14 and is_alone and run.stop.received is None:
            time.sleep(0.05)
    return train_step(run)

loop.train_step = gated_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


def start_node(folder: Path, port: int) -> subprocess.Popen:
    """Start torchrun as it runs on each node."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "elastic"),
        *("--rdzv_conf", "last_call_timeout=2,keep_alive_interval=1", "--max_restarts", "3"),
        *("program.py", "--config", "config.yaml"),
    ]
    environment = os.environ | {
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        # Otherwise a node that joins later waits for an address that the first one has not published again.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / "messages.txt").open("a") as messages:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=messages, stdout=messages)


def wait_for(path: Path, text: str, *, timeout_s: float = 150) -> None:
    start_s = time.monotonic()
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < start_s + timeout_s, (path.parent / "messages.txt").read_text()
        time.sleep(0.1)


def kill_node(node: subprocess.Popen) -> None:
    processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    node.wait()


@pytest.mark.weekly
def test_a_node_is_lost_and_another_joins(tiny_run, tmp_path, fault):
    flags = ("--train.per_device_batch_size", "4", "--train.max_steps", "18")
    alone = train(tiny_run(*flags, name="alone"))
    config = tiny_run(*flags)
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [start_node(tmp_path, port)]
    try:
        time.sleep(1)  # the first node holds the meeting point
        nodes.append(start_node(tmp_path, port))
        wait_for(tmp_path / "step", "10 2")
        kill_node(nodes[1])
        (tmp_path / "lost").touch()
        wait_for(tmp_path / "step", "14 1")
        nodes.append(start_node(tmp_path, port))
        codes = [nodes[i].wait(timeout=150) for i in (0, 2)]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_node(node)

    messages = (tmp_path / "messages.txt").read_text()
    assert codes == [0, 0], messages
    assert "resumed at step 8" in messages and "resumed at step 15" in messages, messages
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        expected = read_series(alone, name)
        assert read_series(config.output_dir, name) == pytest.approx(expected, rel=1e-4), name
    environment = RunDir(config.output_dir).read_environment()
    sessions = [*environment["earlier_sessions"], environment]
    assert [(one["first_step"], one["num_processes"]) for one in sessions] == [(1, 2), (9, 1), (16, 2)]
    fault(
        "one of two nodes of `torchrun --nnodes 1:2` is killed, and another joins later",
        "the other node resumes the last checkpoint alone; at the join it saves, and both resume without a "
        "lost step",
    )

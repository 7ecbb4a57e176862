"""Shared by the training tests: read the results of a run, compare runs, and interrupt them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from script_process import run_forked

from tinystories_slm.config import RunConfig
from tinystories_slm.errors import TrainingInterrupted
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training import loop, train
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.ema import EMA_FILE

EXACT_METRICS = ("train/loss", "train/lr", "train/grad_norm", "val/loss")
"""Metrics that do not depend on the clock."""


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare bit by bit."""
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def read_series(run_dir: Path, name: str) -> dict[int, float]:
    """Return the metric `name` by step."""
    return {line["step"]: line[name] for line in read_metrics(run_dir / "metrics.jsonl") if name in line}


def assert_same_run(one: Path, other: Path) -> None:
    """Compare weights, optimizer state, EMA, metrics and samples of two runs bit by bit."""
    for name in ("best", "last"):
        actual, expected = (run / name / "model.safetensors" for run in (one, other))
        assert actual.read_bytes() == expected.read_bytes(), name
    newest, newest_other = checkpoints(one)[-1], checkpoints(other)[-1]
    assert newest.name == newest_other.name
    optimizers = sorted(path.name for path in newest.glob("optimizer*.bin"))
    assert optimizers
    for name in optimizers:
        actual, expected = (torch.load(folder / name, weights_only=True) for folder in (newest, newest_other))
        torch.testing.assert_close(actual["state"], expected["state"], rtol=0, atol=0)
    ema_files = [folder / EMA_FILE for folder in (newest, newest_other)]
    if any(path.exists() for path in ema_files):
        assert ema_files[0].read_bytes() == ema_files[1].read_bytes()
    for name in EXACT_METRICS:
        assert read_series(one, name) == read_series(other, name), name
    assert (one / "samples.md").read_text() == (other / "samples.md").read_text()


@contextmanager
def send_signals(monkeypatch: pytest.MonkeyPatch, stops: dict[int, signal.Signals]) -> Iterator[None]:
    """Send each signal of `stops` to this process once, at the beginning of its step.

    SIGHUP is ignored in a process that was started with nohup, unless a test sends it.
    """
    pending, train_step = dict(stops), loop.train_step
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in {*stops.values()}}

    def interrupted_step(run):
        if number := pending.pop(run.progress.step + 1, None):
            os.kill(os.getpid(), number)
        return train_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted_step)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train_with_stops(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, stops: dict[int, signal.Signals]
) -> Path:
    """Train, stop by a signal at each step of `stops`, resume, and return the run directory."""
    with send_signals(monkeypatch, stops):
        for step in stops:
            with pytest.raises(TrainingInterrupted, match=rf"stopped after step {step} of \d+, checkpoint"):
                train(config)
        return train(config)


def run_processes(
    script: Path, *arguments: str | Path, num_processes: int, env: Mapping[str, str] | None = None
) -> None:
    """Run `script` in the processes of a launch, which are forked with the libraries imported."""
    for done in run_launch([script, *arguments], num_processes, env=env or {}):
        assert done.returncode == 0, done.stderr


def _launch_variables(num_processes: int) -> dict[str, str]:
    """Return the environment of CPU processes of a launch on this machine, without their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(num_processes)
    return os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
        **{"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    }


def start_two_processes(arguments: list[str], cwd: Path, *, program: Path) -> list[subprocess.Popen]:
    """Start `program` as the two processes of a launch, in one process group and without a launcher.

    Their standard error is piped, as text.
    """
    environment = _launch_variables(2) | {
        **{"EXIT_CODES": str(cwd / "exit_codes")},
        **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    }
    command = [program] if program.suffix == ".sh" else [sys.executable, program]
    processes: list[subprocess.Popen] = []
    for rank in ("0", "1"):
        names = ("SLURM_PROCID", "SLURM_LOCALID", "RANK", "LOCAL_RANK")
        processes.append(
            subprocess.Popen(
                [*command, *arguments],
                env=environment | dict.fromkeys(names, rank),
                cwd=cwd,
                stderr=subprocess.PIPE,
                text=True,
                process_group=processes[0].pid if processes else 0,
            )
        )
    return processes


def run_launch(
    command: Sequence[str | Path], num_processes: int, *, env: Mapping[str, str]
) -> list[subprocess.CompletedProcess]:
    """Run `script, *arguments` as the processes of a launch, forked and without a launcher."""
    environment = _launch_variables(num_processes) | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **env,
    }  # fmt: skip

    def run(rank: int) -> subprocess.CompletedProcess:
        return run_forked(
            command, ROOT, env=environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)), timeout=240
        )

    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(run, range(num_processes)))

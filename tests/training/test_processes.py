"""Several processes are one run: real ones, joined by gloo on the loopback."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from tinystories_slm.config import save_config
from tinystories_slm.training.tracking import read_metrics


def launch(config_file, num_processes: int, *flags: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_processes}",
    ]
    return subprocess.run(
        [*command, str(ROOT / "scripts" / "train.py"), "--config", str(config_file), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_train_what_one_does(tiny_run, tmp_path):
    config = tiny_run("--train.per_device_batch_size", "4", "--train.optimizer", "muon")
    save_config(config, tmp_path / "config.yaml")
    series = {}
    for num_processes in (1, 2):
        run_dir = tmp_path / f"run{num_processes}"
        done = launch(tmp_path / "config.yaml", num_processes, f"--output_dir={run_dir}")
        assert done.returncode == 0, done.stderr
        told = re.findall(r"on: (\d) process(?:es)?, cpu.*, (\d) micro-batch", done.stderr)
        assert told == [(str(num_processes), str(2 // num_processes))]  # the same batch, and one voice
        lines = read_metrics(run_dir / "metrics.jsonl")
        series[num_processes] = {
            name: [line[name] for line in lines if name in line]
            for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss")
        }

    assert len(series[1]["train/loss"]) == 12
    for name, values in series[1].items():
        assert series[2][name] == pytest.approx(values, rel=1e-3), name


def test_what_the_first_process_is_refused_ends_every_process(tiny_run, tmp_path):
    save_config(tiny_run("--train.per_device_batch_size", "4"), tmp_path / "config.yaml")
    done = launch(tmp_path / "config.yaml", 2, "--data.max_stories", "7")

    assert done.returncode != 0
    assert done.stderr.count("error: data.data_dir") == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own, about its children's exit code


def test_what_is_refused_is_told_once_and_ends_every_process(tiny_run, tmp_path):
    save_config(tiny_run(), tmp_path / "config.yaml")
    done = launch(tmp_path / "config.yaml", 3)

    assert done.returncode != 0
    assert done.stderr.count("error: train.batch_size (8) must be a multiple of") == 1
    assert not (tmp_path / "run").exists()

"""Errors of the machine: deleted data, a full disk, a read-only directory, too little memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training.helpers import (
    assert_equal_tensors,
    load_weights,
)

from tinystories_slm.config import save_config
from tinystories_slm.errors import UserError
from tinystories_slm.io import atomic
from tinystories_slm.training import loop, train
from tinystories_slm.training.checkpoints import checkpoints, verify_checkpoint


def test_deleted_token_files_end_the_run_and_are_prepared_again(
    data_dir, tiny_run, tmp_path, monkeypatch, fault
):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    whole = train(tiny_run(name="whole"))
    flags = ("--data.data_dir", str(folder))
    train_step = loop.train_step

    def step_after_deletion(run):
        if run.progress.step == 5:
            for path in folder.glob("*.bin"):
                path.unlink()
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", step_after_deletion)
    with pytest.raises(UserError, match=r"data.data_dir \(.*\) can no longer be read: .*train.bin"):
        train(tiny_run(*flags))
    monkeypatch.undo()
    run_dir = train(tiny_run(*flags))

    assert_equal_tensors(load_weights(run_dir / "last"), load_weights(whole / "last"))
    fault(
        "the token files are deleted during a run",
        "an error (exit code 2); the same command prepares identical files again and resumes",
    )


def test_full_disk_read_only_directory_and_out_of_memory(tiny_run, tmp_path, fault):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "t", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("this system does not permit private mounts (unshare -rm, mount)")
    save_config(
        tiny_run("--train.max_steps=60", "--train.save_every=2", "--train.eval_every=30"),
        tmp_path / "config.yaml",
    )
    (tmp_path / "disk").mkdir()
    script = Path(__file__).with_name("machine_faults.py")
    command = ["unshare", "-rm", sys.executable, script, tmp_path / "config.yaml", tmp_path / "disk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])

    full = report["full disk"]
    assert "can no longer be written to" in full["error"] and "free disk space" in full["error"]
    assert "No space left" in full["error"] or "space" in full["error"]
    assert "can no longer be written to" in full["start error"] and "No space left" in full["start error"]
    assert full["intact"] == full["found"] and len(full["intact"]) >= 2
    assert full["end"][-1] == "step_000060"
    fault(
        "the disk is full while a checkpoint is saved",
        "an error (exit code 2); finished checkpoints are intact; with free space the same command resumes",
    )
    read_only = report["read-only"]
    assert "Read-only file system" in read_only["error"] and read_only["end"][-1] == "step_000060"
    fault("the run directory becomes read-only during a run", "as for a full disk")
    assert "out of memory; halve train.per_device_batch_size (32768)" in report["out of memory"]["error"]
    fault("the batch does not fit into memory", "an error names the option to halve (exit code 2)")


def test_a_run_needs_neither_locks_nor_fsync(tiny_run, tmp_path, monkeypatch, caplog, fault):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(atomic, "_warned", set())
    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)
    run_dir = train(tiny_run("--data.data_dir", str(tmp_path / "data"), "--train.max_steps", "8"))
    found = checkpoints(run_dir)
    assert [path.name for path in found] == ["step_000004", "step_000008"]
    assert [verify_checkpoint(path) for path in found] == [None, None]
    warnings = [record.message for record in caplog.records if "No locks available" in record.message]
    assert len(warnings) == 2
    fault(
        "the file system has no locks and cannot flush files (a mounted cloud drive)",
        "the run is trained and saved; one line for each says what protection is missing",
    )

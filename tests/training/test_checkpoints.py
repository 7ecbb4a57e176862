"""Checkpoints: damage is detected, and another run or other data are rejected."""

import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest
from training.helpers import (
    assert_equal_tensors,
    load_weights,
)

from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.training import checkpoints as checkpoint_files
from tinystories_slm.training import is_finished, loop, train
from tinystories_slm.training.checkpoints import (
    checkpoint_step,
    checkpoints,
    read_progress,
    verify_checkpoint,
)

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped bit": lambda path: path.write_bytes(
        (data := path.read_bytes())[:300] + bytes([data[300] ^ 1]) + data[301:]
    ),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "checkpoint.json"])
def test_damaged_newest_checkpoint_is_skipped(damage, name, tiny_run, caplog, fault):
    run_dir = train(tiny_run())
    expected = load_weights(run_dir / "last")
    damage(run_dir / "checkpoints" / "step_000012" / name)
    assert not is_finished(tiny_run())
    caplog.clear()
    train(tiny_run())

    assert "step_000012 is damaged" in caplog.text
    assert "resumed at step 8" in caplog.text
    assert verify_checkpoint(run_dir / "checkpoints" / "step_000012") is None
    assert_equal_tensors(load_weights(run_dir / "last"), expected)
    fault(
        "a file of the newest checkpoint is truncated, has a flipped bit, or is deleted",
        "the checksum detects it; the run logs a warning and resumes the previous checkpoint, bit-identical",
    )


def test_flipped_bit_in_checkpoint_json_is_detected(tiny_run):
    folder = checkpoints(train(tiny_run("--train.max_steps", "5", "--train.log_every", "3")))[-1]
    path = folder / "checkpoint.json"
    intact, progress = path.read_bytes(), read_progress(folder)
    assert verify_checkpoint(folder) is None
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1]) + intact[i + 1 :])
        # A change of the seventeenth digit may leave the number itself unchanged.
        assert verify_checkpoint(folder) or read_progress(folder) == progress, intact[: i + 1]


def test_damaged_checkpoint_does_not_push_out_valid_ones(tiny_run, monkeypatch):
    run_dir = train(tiny_run())
    (run_dir / "checkpoints" / "step_000012" / "optimizer.bin").write_bytes(b"garbage")
    train_step = loop.train_step

    def interrupted_step(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    for keep, expected_steps in ((2, [8, 9]), (1, [10])):
        with pytest.raises(TrainingInterrupted):
            train(tiny_run("--train.keep", f"newest:{keep}"))
        assert [checkpoint_step(folder) for folder in checkpoints(run_dir)] == expected_steps


def test_all_checkpoints_damaged_raises_and_deletes_nothing(tiny_run, fault):
    run_dir = train(tiny_run())
    for folder in checkpoints(run_dir):
        (folder / "optimizer.bin").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; .*--train.resume never"):
        train(tiny_run())

    assert len(checkpoints(run_dir)) == 2 and (run_dir / "best").is_dir()
    fault("every checkpoint is damaged", "an error names the directory; no file is deleted (exit code 2)")


def test_pickle_in_a_checkpoint_is_not_executed(tiny_run, tmp_path, monkeypatch, fault):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    folder = run_dir / "checkpoints" / "step_000008"
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    record = json.loads((folder / "checkpoint.json").read_text())
    record["sha256"] = checkpoint_files._sha256_of_files(folder)  # an attacker forges the checksums too
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"step_000008 does not fit this run or is damaged"):
        train(tiny_run())

    assert not (tmp_path / "executed").exists()
    fault(
        "the files of a checkpoint are replaced by pickles that run code", "an error; the code does not run"
    )


def test_checkpoints_are_sorted_by_step(tmp_path):
    for step in (999_000, 1_000_000, 200):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_2000000.partial").mkdir()

    assert [checkpoint_step(folder) for folder in checkpoints(tmp_path)] == [200, 999_000, 1_000_000]


def test_checkpoints_of_a_run_that_starts_over_raise_nothing(tmp_path):
    """Another process removes the folder between two system calls of the reader."""
    folder = tmp_path / "checkpoints"
    stop = threading.Event()

    def start_over_again_and_again():
        while not stop.is_set():
            folder.mkdir()
            folder.rmdir()

    other = threading.Thread(target=start_over_again_and_again)
    other.start()
    try:
        assert [checkpoints(tmp_path) for _ in range(3000)] == [[]] * 3000
    finally:
        stop.set()
        other.join()


def test_another_configuration_raises_with_every_difference(tiny_run):
    run_dir = train(tiny_run())
    before = (run_dir / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as error:
        train(tiny_run("--model.hidden_size", "32", "--train.lr", "0.02", "--train.log_every", "5"))

    message = str(error.value)
    assert "model.hidden_size was 16 and is 32" in message and "train.lr was 0.01 and is 0.02" in message
    assert "log_every" not in message and "--train.resume never" in message and "\n" not in message
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_resume_with_other_data_raises(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"run with other data: tokenizer_sha256 was '0+' and is"):
        train(tiny_run())


def test_resume_without_the_manifest_raises(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    manifest = (run_dir / "manifest.json").read_text()
    (run_dir / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"manifest.json, .* is missing or damaged; .*copy manifest.json from there"
    ):
        train(tiny_run())
    (run_dir / "manifest.json").write_text(manifest)
    train(tiny_run())

"""Run directory: locked, never overwritten by accident, deleted only on request."""

import hashlib
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from training.helpers import assert_equal_tensors, load_weights, read_series, send_signals

from tinystories_slm.commands.quickstart import run_quickstart
from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training import loop, restore_finished_run, train
from tinystories_slm.training.checkpoints import checkpoints, read_progress
from tinystories_slm.training.run import start_run


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a model folder, by `best/config.json` and so on."""
    return {
        f"{folder.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


def test_second_run_in_a_locked_directory_raises(tiny_run, fault):
    first = start_run(tiny_run())
    with pytest.raises(UserError, match=r"output_dir \(.*\) is in use by another process"):
        train(tiny_run("--train.resume", "never"))
    first.close()
    train(tiny_run())
    fault(
        "a second run starts in the same run directory", "an error (exit code 2); the first run is unchanged"
    )


def test_directory_that_is_not_a_run_is_left_unchanged(tiny_run, tmp_path):
    precious = tmp_path / "run" / "checkpoints" / "precious"
    precious.mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints but no config.yaml, so it is not a run"):
        train(tiny_run())
    assert precious.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir \(.*file\) cannot be written to"):
        train(tiny_run(name="file"))


def test_resume_never_starts_over(tiny_run):
    run_dir = train(tiny_run())
    (run_dir / "evaluation.json").write_text("{}")
    train(tiny_run("--train.resume", "never", "--model.hidden_size", "32", "--train.max_steps", "4"))

    assert list(read_series(run_dir, "train/loss")) == [1, 2, 3, 4]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000004"]
    assert not (run_dir / "evaluation.json").exists()  # it described the old model
    model, _ = load_model_folder(str(run_dir / "last"))
    assert model.config.hidden_size == 32


def test_models_without_checkpoints_are_not_overwritten(tiny_run):
    run_dir = train(tiny_run())
    before = load_weights(run_dir / "best")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match=r"holds a trained model but no checkpoints .*--train.resume never"):
        train(tiny_run())
    (run_dir / "checkpoints").mkdir()  # as after a kill before the first checkpoint
    with pytest.raises(UserError, match=r"another configuration: train.lr was 0.01 and is 0.5"):
        train(tiny_run("--train.lr", "0.5"))

    assert_equal_tensors(load_weights(run_dir / "best"), before)
    train(tiny_run())


def test_deleted_best_of_a_stopped_run_is_written_again(tiny_run, monkeypatch, caplog, fault):
    whole = train(tiny_run("--train.keep", "newest:9", name="whole"))
    config = tiny_run("--train.keep", "newest:9")
    worse = (evaluation_loss for evaluation_loss in (5.0, 6.0, 7.0))
    monkeypatch.setattr(loop, "validation_loss", lambda *_: next(worse))  # best/ is of step 4
    with pytest.raises(TrainingInterrupted), send_signals(monkeypatch, {10: signal.SIGTERM}):
        train(config)
    before = hashes(config.output_dir / "best")
    shutil.rmtree(config.output_dir / "best")
    train(config)

    assert hashes(config.output_dir / "best") == before
    expected = load_weights(whole / "checkpoints" / "step_000004")
    actual = load_weights(config.output_dir / "best")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert any("best was missing; written again from" in line for line in caplog.messages)
    fault("best/ is deleted, then the run is resumed or repeated", "it is written again, byte for byte")


def test_deleted_best_without_its_checkpoint_is_replaced_by_the_next_evaluation(
    tiny_run, monkeypatch, caplog
):
    config = tiny_run("--train.keep", "newest:1")
    worse = (evaluation_loss for evaluation_loss in (5.0, 6.0, 7.0))
    monkeypatch.setattr(loop, "validation_loss", lambda *_: next(worse))
    with pytest.raises(TrainingInterrupted), send_signals(monkeypatch, {10: signal.SIGTERM}):
        train(config)
    shutil.rmtree(config.output_dir / "best")
    train(config)

    assert_equal_tensors(load_weights(config.output_dir / "best"), load_weights(config.output_dir / "last"))
    assert any("no checkpoint of its step 4 is left; the next evaluation" in line for line in caplog.messages)
    assert read_progress(checkpoints(config.output_dir)[-1]).best_step == 12


@pytest.mark.parametrize("ema", [(), ("--train.ema_decay", "0.9")], ids=["weights", "EMA"])
def test_deleted_models_of_a_finished_run_are_written_again(ema, tiny_run):
    config = tiny_run(*ema)
    run_dir = train(config)
    before = hashes(run_dir / "best") | hashes(run_dir / "last")
    for name in ("best", "last"):
        shutil.rmtree(run_dir / name)
    restore_finished_run(config)
    assert hashes(run_dir / "best") | hashes(run_dir / "last") == before

    shutil.rmtree(run_dir / "best")
    shutil.rmtree(run_dir / "last")
    (run_dir / "manifest.json").rename(run_dir / "manifest.old")
    with pytest.raises(UserError, match=r"last is missing, and no checkpoint of its step 12 can replace it"):
        train(config)


def test_older_checkpoint_of_the_same_directory_raises(tiny_run, tmp_path, monkeypatch):
    run_dir = train(tiny_run())
    step_8, step_12 = checkpoints(run_dir)
    with pytest.raises(UserError, match=r"train.resume \(.*step_000008\) is not the newest .*--output_dir"):
        train(tiny_run("--train.resume", str(step_8)))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"train.resume \(~/run/.*step_000008\) is not the newest"):
        train(tiny_run("--train.resume", f"~/{step_8.relative_to(tmp_path)}"))
    train(tiny_run("--train.resume", str(step_12)))
    with pytest.raises(
        UserError, match=r"train.resume \(atuo\) must be auto, never, extend, or a checkpoint"
    ):
        tiny_run("--train.resume", "atuo")


def test_a_refused_start_leaves_a_linked_run_directory(tiny_run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with pytest.raises(
        UserError, match=r"train.resume \(.*step_1\) must be auto, never, extend, or a checkpoint"
    ):
        train(tiny_run("--train.resume", str(tmp_path / "step_1")))
    assert (tmp_path / "run").is_symlink() and not list((tmp_path / "disk").iterdir())


def test_resume_never_keeps_the_copies_of_the_user(tiny_run):
    run_dir = train(tiny_run("--train.max_steps", "4"))
    shutil.copytree(run_dir / "best", run_dir / "best.old")
    train(tiny_run("--train.max_steps", "4", "--train.resume", "never"))
    assert (run_dir / "best.old" / "model.safetensors").is_file()


def stories_run(tmp_path: Path, source: str, **folders: Path) -> RunConfig:
    """Configuration of a run of two steps on `source`."""
    folders = {"data.data_dir": tmp_path / "data", "output_dir": tmp_path / "run"} | folders
    flags = [f"--{name}={folder}" for name, folder in folders.items()]
    return parse_config(
        [
            "--config=configs/debug.yaml", f"--data.source={source}", "--data.max_stories=null", *flags,
            "--tokenizer.vocab_size=300", "--data.seq_len=32", "--train.max_steps=2",
            "--train.warmup_steps=1",
        ]
    )  # fmt: skip


def test_finished_run_reports_changed_and_deleted_stories(tmp_path, caplog):
    source = tmp_path / "mine.txt"
    source.write_text("".join(f"Tom saw {number} foxes.<|endoftext|>" for number in range(60)))
    config = stories_run(tmp_path, str(source))
    train(config)
    content = source.read_text()
    source.write_text(content + "Sue saw a bear.<|endoftext|>")
    for command in (train, run_quickstart):
        with pytest.raises(UserError, match="holds a finished run on other stories") as error:
            command(config)
        assert re.search(r"mine\.txt' has changed from sha256:\w+ to sha256:\w+", str(error.value))
        assert f"or delete {tmp_path / 'run'} and {tmp_path / 'data'}" in str(error.value)
    source.write_text(content)
    assert train(config) == tmp_path / "run"
    assert "no longer exists" not in caplog.text
    source.unlink()
    assert train(config) == tmp_path / "run"
    assert "mine.txt no longer exists; using the stories downloaded from it earlier" in caplog.text


def test_stories_and_folders_of_a_run_lie_apart(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    stories = folder / "stories.jsonl"  # a run deletes an earlier file of this name in its directory
    stories.write_text("".join(f'{{"text": "story {number}"}}\n' for number in range(60)))
    for source, folders, option in (
        (stories, {"output_dir": folder}, "output_dir"),
        (folder, {"output_dir": folder / "run"}, "output_dir"),
        (folder, {"output_dir": folder}, "output_dir"),
        (folder, {"data.data_dir": folder / "data"}, "data.data_dir"),
    ):
        with pytest.raises(UserError, match=rf"^{option} \(.*\): must lie apart from data.source"):
            train(stories_run(tmp_path, str(source), **folders))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "stories.jsonl"]

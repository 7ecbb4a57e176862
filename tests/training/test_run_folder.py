"""Run directory: locked, never overwritten by accident, deleted only on request."""

import re
import shutil
from pathlib import Path

import pytest
from training.helpers import assert_equal_tensors, load_weights, read_series

from tinystories_slm.commands.quickstart import run_quickstart
from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.errors import UserError
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.run import start_run


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


def test_older_checkpoint_of_the_same_directory_raises(tiny_run):
    run_dir = train(tiny_run())
    step_8, step_12 = checkpoints(run_dir)
    with pytest.raises(UserError, match=r"train.resume \(.*step_000008\) is not the newest .*--output_dir"):
        train(tiny_run("--train.resume", str(step_8)))
    train(tiny_run("--train.resume", str(step_12)))
    with pytest.raises(UserError, match=r"train.resume \(atuo\) must be auto, never, or a checkpoint"):
        tiny_run("--train.resume", "atuo")


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

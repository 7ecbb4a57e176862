"""Output files on a full disk: one line, and the earlier file stays."""

import errno
import json
import sys

import pytest
from conftest import tiny_model

from tinystories_slm.commands.generate import write_results
from tinystories_slm.config import save_config
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.reports import ReportArgs
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.generation import SamplingParams
from tinystories_slm.generation.request import GenerationResult
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.runs.report import report


@pytest.fixture
def full_disk(tmp_path):
    """A function that gives `tmp_path / name` old contents, and no space for its temporary file."""

    def fill(name: str) -> None:
        (tmp_path / name).write_text("old")
        (tmp_path / f"{name}.partial").symlink_to("/dev/full")

    return fill


def test_full_disk_keeps_the_earlier_report(tmp_path, tiny_run, full_disk):
    save_config(tiny_run(), tmp_path / "config.yaml")
    full_disk("report.html")
    with pytest.raises(
        UserError, match=r"^run \(.*\) cannot be written to \(No space left on device\); free disk"
    ):
        report(ReportArgs(run=tmp_path))
    assert (tmp_path / "report.html").read_text() == "old" and not list(tmp_path.glob("*.partial"))


def test_full_disk_keeps_the_earlier_scores_and_stdout_comes_second(
    tmp_path, tokenizer, full_disk, monkeypatch, capsys
):
    folder = save_model_folder(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "best")
    (tmp_path / "stories.jsonl").write_text('{"text": "Once upon a time there was a fox."}\n' * 3)
    args = EvaluateArgs(
        model=str(folder), data=str(tmp_path / "stories.jsonl"), split="train", batch_size=10**30,
        output=tmp_path / "scores.json",
    )  # fmt: skip
    full_disk("scores.json")
    message = r"^output \(.*scores\.json\) cannot be written to \(No space left on device\); free disk space$"
    with pytest.raises(UserError, match=message):
        evaluate(args)
    assert (tmp_path / "scores.json").read_text() == "old" and not list(tmp_path.glob("*.partial"))

    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(args)
    assert json.loads((tmp_path / "scores.json").read_text())["num_stories"] == 3


def test_stories_of_a_run_are_written_whole_or_not_at_all(tmp_path):
    result = GenerationResult(
        prompt="Once", text="Once upon.", seed=0, num_new_tokens=2, finish_reason="stop"
    )
    path = tmp_path / "stories.jsonl"

    def full_disk():
        yield result
        raise OSError(errno.ENOSPC, "No space left on device")

    for before in (None, "earlier\n"):
        if before:
            path.write_text(before)
        with pytest.raises(OSError, match="No space"):
            write_results(path, full_disk(), "best", None, SamplingParams())
        assert (path.read_text() if path.exists() else None) == before
    write_results(path, [result] * 3, "best", None, SamplingParams())
    assert path.read_text().count("\n") == 3

"""Scores, stories, card and report of the quickstart: of the weights in best/, whatever happened before."""

import json
import signal
from pathlib import Path

import pytest
from training.helpers import send_signals

from tinystories_slm import grammar
from tinystories_slm.commands import quickstart
from tinystories_slm.commands.quickstart import run_quickstart
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.data.sources import builtin
from tinystories_slm.errors import TrainingInterrupted
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.training import train

REVISION = f"grammar {grammar.VERSION}"


def read_files(run_dir: Path) -> dict[str, str]:
    names = ("evaluation.json", "stories.jsonl", "best/README.md", "report.html")
    return {name: (run_dir / name).read_text() for name in names}


def test_figures_of_older_weights_are_made_again(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(builtin, "BUILTIN_STORIES", 300)
    monkeypatch.setattr(quickstart, "EVAL_STORIES", 3)
    config = tiny_run("--train.eval_every", "3")
    run_dir = config.output_dir
    with send_signals(monkeypatch, {5: signal.SIGTERM}), pytest.raises(TrainingInterrupted):
        train(config)
    options = {"model": str(run_dir / "best"), "data": "builtin", "max_stories": 3}
    older = evaluate(EvaluateArgs(**options, output=run_dir / "evaluation.json"))
    capsys.readouterr()
    run_quickstart(config)
    printed = capsys.readouterr().out

    scores = json.loads((run_dir / "evaluation.json").read_text())
    sha256 = file_sha256(run_dir / "best" / "model.safetensors")
    assert scores["loss"] == pytest.approx(evaluate(EvaluateArgs(**options))["loss"]) != older["loss"]
    assert scores["weights_sha256"] == sha256 != older["weights_sha256"]
    assert f"loss           {scores['loss']:.4f} nats" in printed
    assert "scored         3 of 21 stories, " in printed
    assert (scores["split"], scores["revision"], scores["data"]) == ("validation", REVISION, "builtin")
    stories = [json.loads(line) for line in (run_dir / "stories.jsonl").read_text().splitlines()]
    assert [story["weights_sha256"] for story in stories] == [sha256] * 3
    files = read_files(run_dir)
    for text in (sha256, f"| loss, nats per token | {scores['loss']:.4f} |", "optimizer step 12"):
        assert text in files["best/README.md"]
    assert sha256 in files["report.html"] and older["weights_sha256"] not in files["report.html"]


def test_interrupted_quickstart_makes_what_is_missing(tiny_run, monkeypatch, caplog):
    monkeypatch.setattr(quickstart, "EVAL_STORIES", 3)
    config = tiny_run()
    run_dir = config.output_dir
    run_quickstart(config)
    complete = read_files(run_dir)
    times = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    run_quickstart(config)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == times  # nothing is written

    for damage in (
        {"best/README.md": None, "stories.jsonl": None},
        {"evaluation.json": '{\n  "loss": 5.', "best/README.md": "", "report.html": ""},
        {"evaluation.json": complete["evaluation.json"].replace(REVISION, "sha256:0")},
    ):
        for name, text in damage.items():
            (run_dir / name).unlink() if text is None else (run_dir / name).write_text(text)
        run_quickstart(config)
        assert read_files(run_dir) == complete, damage
    assert "evaluation.json cannot be read" in caplog.text
    assert "evaluation.json is of another revision; evaluating again" in caplog.text

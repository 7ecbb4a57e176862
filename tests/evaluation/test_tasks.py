"""Evaluation tasks: measurements of generated stories."""

import json

import pytest

from tinystories_slm import grammar
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.evaluation.tasks import EvalContext, EvalResult, run_tasks
from tinystories_slm.generation.request import GenerationResult
from tinystories_slm.model_folder import save_model_folder


def test_tasks_measure_shares_of_generated_stories():
    accepted = grammar.generate_story(0, 0).text
    stories = [
        GenerationResult("", 0, accepted, 9, "stop"),
        GenerationResult("", 1, accepted.replace("was", "wuz"), 9, "stop"),
        GenerationResult("", 2, accepted[:40], 9, "length"),
        GenerationResult("", 3, accepted, 9, "stop"),
    ]
    context = EvalContext(model=None, tokenizer=None)
    context.__dict__["stories"] = stories
    assert run_tasks(["ended", "grammar"], context) == [
        EvalResult("ended", 0.75, "share of stories", 4),
        EvalResult("grammar", 0.5, "share of stories", 4),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_evaluate_prints_and_writes_the_results_of_tasks(model_with_tokenizer, tokenizer, tmp_path, capsys):
    save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "model")
    (tmp_path / "mine.txt").write_text("A fox ran.<|endoftext|>A fox sat.<|endoftext|>")
    evaluate(
        EvaluateArgs(
            model=str(tmp_path / "model"),
            data=str(tmp_path / "mine.txt"),
            tasks="ended, grammar",
            output=tmp_path / "scores.json",
        )
    )
    ended, accepted = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert (ended["name"], ended["count"], accepted["value"]) == ("ended", 16, 0.0)
    assert "grammar: 0 share of stories (16)" in capsys.readouterr().out

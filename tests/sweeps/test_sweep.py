"""A small sweep from its file to its table: interrupted, resumed, changed, and with a run that fails."""

import json
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from tinystories_slm.config.command_args.sweep import SweepArgs, SweepEvaluationArgs
from tinystories_slm.errors import TrainingInterrupted, UserError
from tinystories_slm.sweeps.grid import expand_sweep
from tinystories_slm.sweeps.state import read_state
from tinystories_slm.sweeps.sweep import sweep
from tinystories_slm.training.checkpoints import checkpoint_step, checkpoints

OPTIONS = {
    "data.max_stories": 300, "data.seq_len": 32, "tokenizer.vocab_size": 300, "model.num_attention_heads": 2,
    "train.max_steps": 6, "train.save_every": 6, "train.eval_every": 6, "train.eval_stories": 2,
}  # fmt: skip


@pytest.fixture
def args(tmp_path, data_dir, monkeypatch) -> SweepArgs:
    """Two runs on the shared data, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return SweepArgs(
        output_dir=Path("sweep"),
        base=str(ROOT / "configs" / "debug.yaml"),
        options=OPTIONS | {"data.data_dir": str(data_dir)},
        grid={"model.hidden_size": [8, 16], "model.num_hidden_layers": [1]},
        evaluation=SweepEvaluationArgs(max_stories=3),
    )


SMALL, LARGE = (Path(f"sweep/hidden_size_{size}-num_hidden_layers_1-seed_0") for size in (8, 16))


def rows() -> dict[str, dict]:
    return {Path(row["name"]).name: row for row in json.loads(Path("sweep/sweep.json").read_text())["runs"]}


def test_interrupted_sweep_does_only_what_is_missing(args, commands, capsys):
    long = {"train.max_steps": 200, "train.save_every": 20, "train.eval_every": 200}
    args = replace(args, options=args.options | long)
    resumed_from = []

    def stop_in_second_run() -> None:
        if found := checkpoints(LARGE):
            resumed_from.append(checkpoint_step(found[-1]))
            commands.on_poll = lambda: None
            os.kill(os.getpid(), signal.SIGTERM)

    commands.on_poll = stop_in_second_run
    with pytest.raises(TrainingInterrupted, match="run the same command to go on"):
        sweep(args)
    assert commands.started == [("train", SMALL), ("evaluate", SMALL), ("train", LARGE)]
    step = checkpoint_step(checkpoints(LARGE)[-1])
    assert 0 < resumed_from[0] <= step < 200
    printed = capsys.readouterr().out
    assert "1 of 2 runs are finished." in printed and f"| {step} of 200 steps |" in printed

    commands.started.clear()
    sweep(args)
    assert commands.started == [("train", LARGE), ("evaluate", LARGE)]
    lines = [json.loads(line) for line in (LARGE / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(2, 201, 2))
    scores = json.loads((LARGE / "evaluation.json").read_text())
    row = rows()[LARGE.name]
    assert row["metrics"]["bits_per_byte"]["value"] == scores["bits_per_byte"] and row["steps"] == 200
    assert row["vocab_size"] == 300 and row["entropy_bits_per_byte"] == scores["entropy_bits_per_byte"]
    manifest = json.loads((LARGE / "manifest.json").read_text())["splits"]["train"]
    assert row["unique_tokens"] == manifest["num_tokens"]
    assert row["bytes_per_token"] == manifest["num_bytes"] / manifest["num_tokens"]
    assert [row["metrics"]["loss"][side] for side in ("low", "high")] == scores["intervals"]["loss"]

    commands.started.clear()
    sweep(args)
    assert commands.started == []


@pytest.mark.slow
def test_changed_file_reruns_what_differs_and_keeps_what_was_there(args, commands):
    sweep(args)
    weights = (LARGE / "best" / "model.safetensors").read_bytes()
    commands.started.clear()
    # Other stories are scored again; other options are trained elsewhere; the log is no part of a run.
    changed = replace(args, evaluation=SweepEvaluationArgs(max_stories=4))
    changed = replace(
        changed,
        grid={"h": {"8": {"model.hidden_size": 8}, "16": {"model.hidden_size": 16, "train.beta2": 0.9}}},
        options=args.options | {"train.log_every": 3, "model.num_hidden_layers": 1},
    )
    with suppress(UserError):
        sweep(changed)
    new = [Path(f"sweep/h_{size}-seed_0") for size in (8, 16)]
    assert commands.started == [(name, path) for path in new for name in ("train", "evaluate")]

    commands.started.clear()
    sweep(replace(args, options=args.options | {"train.beta2": 0.9}, grid={"model.hidden_size": [16]}))
    commands.started.clear()
    grid = {"model.hidden_size": [16]}
    sweep(replace(args, options=args.options | {"train.beta2": 0.8}, grid=grid))
    second = Path("sweep/hidden_size_16-seed_0.2")
    assert commands.started == [("train", second), ("evaluate", second)]
    commands.started.clear()
    sweep(replace(args, options=args.options | {"train.beta2": 0.9}, grid=grid))
    assert commands.started == []  # found again in the first folder
    sweep(replace(args, evaluation=SweepEvaluationArgs(max_stories=4)))
    assert commands.started == [("evaluate", SMALL), ("evaluate", LARGE)]
    assert (LARGE / "best" / "model.safetensors").read_bytes() == weights


def test_failing_run_ends_no_other_and_is_listed_with_its_error(args, commands, capsys):
    SMALL.mkdir(parents=True)
    (SMALL / "best").mkdir()  # not a run directory
    with pytest.raises(UserError, match=rf"1 of 2 runs failed: {SMALL.name}: output_dir .* holds best but"):
        sweep(args)
    assert commands.started == [("train", SMALL), ("train", LARGE), ("evaluate", LARGE)]
    assert rows()[LARGE.name]["is_finished"]
    assert rows()[SMALL.name]["state"].startswith("failed: output_dir")
    (SMALL / "best").rmdir()
    commands.started.clear()
    sweep(args)
    assert commands.started == [("train", SMALL), ("evaluate", SMALL)]
    assert rows()[SMALL.name]["state"] == "finished"


def test_index_does_one_run_and_table_none(args, commands, capsys):
    sweep(replace(args, index=1))
    assert commands.started == [("train", LARGE), ("evaluate", LARGE)]
    assert not Path("sweep/sweep.json").exists()  # other tasks may be at it
    with pytest.raises(UserError, match=r"index \(2\): must be below 2"):
        sweep(replace(args, index=2))
    capsys.readouterr()
    sweep(replace(args, list=True))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"   0  {SMALL}  missing" and printed[2] == f"   1  {LARGE}  finished"
    assert printed[1].startswith("      python -m tinystories_slm train --config=")
    assert printed[1].endswith(f"--output_dir={SMALL}")
    assert printed[-1] == "2 to run, at most 1 at a time"
    commands.started.clear()
    sweep(replace(args, table=True))
    assert commands.started == [] and [row["is_finished"] for row in rows().values()] == [False, True]


def test_data_are_prepared_once_for_all_runs_that_share_them(args, commands):
    options = {name: value for name, value in args.options.items() if name != "data.data_dir"}
    args = replace(args, options=options | {"data.data_dir": "data"}, seeds=[0, 1], prepare=True)
    sweep(args)
    assert [name for name, _ in commands.started] == ["prepare_data"]
    assert Path("data/manifest.json").is_file() and not SMALL.exists()


def test_data_that_cannot_be_prepared_start_no_run(args, commands):
    args = replace(args, options=args.options | {"data.source": "none.txt", "data.data_dir": "data"})
    with pytest.raises(UserError, match=r"1 of 2 runs failed: data: .*none.txt"):
        sweep(args)
    assert [name for name, _ in commands.started] == ["prepare_data"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"report_card": {"num_storys": 3}}, "report_card: unknown option 'num_storys'"),
        ({"report_card": {"output": "a.html"}}, r"report_card.output \(a.html\): cannot be set"),
        ({"report_card": {"num_stories": 3}}, r"report_card: num_stories \(3\): must be at least 10"),
        ({"options": {"data.source": "[{name: builtin}]"}}, r"evaluation.data \(null\): a mixture cannot be"),
        ({"metrics": ["los"]}, r"metrics \(los\)"),
    ],
)
def test_bad_options_of_later_commands_start_nothing(args, commands, values, problem):
    with pytest.raises(UserError, match=problem):
        sweep(replace(args, **values))
    assert commands.started == [] and not Path("sweep").exists()


@pytest.mark.slow
def test_report_card_is_written_once_and_its_measures_are_in_the_table(args, commands):
    card = {"num_stories": 10, "max_new_tokens": 12, "memorization": False}
    args = replace(args, grid={"model.hidden_size": [16]}, report_card=card, metrics=["loss", "distinct_1"])
    args = replace(args, options=args.options | {"data.seq_len": 64})  # its prompts have 36 tokens
    sweep(args)
    folder = Path("sweep/hidden_size_16-seed_0")
    assert commands.started == [(name, folder) for name in ("train", "evaluate", "report_card")]
    figures = json.loads((folder / "report_card.json").read_text())
    [measure] = [one for one in figures["measures"] if one["name"] == "distinct_1"]
    [row] = rows().values()
    assert row["metrics"]["distinct_1"]["value"] == measure["by_set"][figures["sets"][0]["name"]]["value"]
    commands.started.clear()
    sweep(args)
    assert commands.started == []
    [run] = expand_sweep(args)
    assert read_state(replace(args, report_card=card | {"seed": 5}), run).card is None

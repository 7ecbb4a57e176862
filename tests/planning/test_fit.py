"""Fit of the planner's law: constants, held-out runs, repetitions and vocabularies of known runs."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from tinystories_slm.commands import run
from tinystories_slm.config import parse
from tinystories_slm.config.command_args.run import StoryArgs, TrainCommandArgs
from tinystories_slm.config.command_args.scaling import ScalingArgs
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.errors import UserError
from tinystories_slm.planning import fit_command
from tinystories_slm.planning.choice import training_options
from tinystories_slm.planning.fit import fit_scaling
from tinystories_slm.planning.fit_command import fit_laws
from tinystories_slm.planning.law import LAW_FILE, effective_tokens, load_laws
from tinystories_slm.planning.measured_runs import MeasuredRun, read_runs
from tinystories_slm.sweeps.grid import expand_sweep

SIZES, TOKENS = (1e5, 4e5, 1.6e6, 6.4e6), (3e5, 9e5, 2.7e6, 8.1e6)
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("python scripts/scaling.py")]


def loss(size: float, tokens: float, factor: float = 1.0) -> float:
    """E = 0.3, alpha = 0.3, beta = 0.4."""
    return factor * (0.3 + 8 * size**-0.3 + 90 * tokens**-0.4)


def measured(size: float, tokens: float, factor: float = 1.0, **values) -> MeasuredRun:
    return MeasuredRun(int(size), int(tokens), loss(size, tokens, factor), **{"vocab_size": 4096} | values)


def make_runs(**values) -> list[MeasuredRun]:
    return [
        measured(size, tokens, bytes_per_token=4.0, unique_tokens=10**8, **values)
        for size in SIZES
        for tokens in TOKENS
    ]


def test_law_and_its_check_of_exact_runs():
    found = fit_scaling(make_runs(), 3.0)
    assert found.law.exponent("parameters").value == pytest.approx(0.3, rel=0.02)
    assert found.law.irreducible.value == pytest.approx(0.3, rel=0.05)
    budgets = [one.run.budget for one in found.check.runs]
    largest = max(run.budget for run in found.check.fitted)
    assert budgets == sorted(budgets) and budgets[0] > largest
    assert 2 * largest < max(budgets) <= 3 * largest and len(found.check.fitted) + len(budgets) == 16
    assert found.check.root_mean_square < 0.003
    assert found.repetition is None and found.vocabularies == {}


def test_check_reports_runs_that_the_law_misses():
    runs = [
        replace(run, bits_per_byte=1.1 * run.bits_per_byte) if run.budget > 1.8e13 else run
        for run in make_runs()
    ]
    found = fit_scaling(runs, 3.0)
    assert [one.error for one in found.check.runs] == pytest.approx(
        [1 / 1.1 - 1 if one.run.budget > 1.8e13 else 0 for one in found.check.runs], abs=0.003
    )


def test_known_entropy_is_the_irreducible_loss():
    runs = [replace(run, entropy=0.3) for run in make_runs()]
    found = fit_scaling(runs, 3.0)
    assert (found.law.irreducible.value, found.law.irreducible.high) == (0.3, 0.3)
    assert found.law.exponent("tokens").value == pytest.approx(0.4, rel=0.01)


def test_repetitions_and_vocabularies_are_compared_with_the_law():
    runs = make_runs()
    for unique in (5e4, 1e5, 3e5):
        tokens = effective_tokens(2.7e6, unique, 8.0)
        one = measured(4e5, tokens, bytes_per_token=4.0)
        runs.append(replace(one, num_tokens=2_700_000, unique_tokens=int(unique)))
    # 2 bytes per token: half the text.
    runs.append(replace(measured(4e5, 9e5, 1.07, bytes_per_token=2.0), num_tokens=1_800_000, vocab_size=512))
    found = fit_scaling(runs, 3.0)
    assert len(found.runs) == 16 and found.num_repeated == 3
    assert found.repetition.value == pytest.approx(8.0, rel=0.05)
    assert found.vocabularies == {512: [pytest.approx(1.07, abs=0.003)]}


def write_sweep(folder: Path, runs: list[MeasuredRun]) -> Path:
    """A folder like that of a finished sweep, with an unfinished run."""
    rows = [
        {
            "name": f"run_{index}",
            "is_twin": False,
            "num_non_embedding_parameters": one.num_parameters,
            "tokens": one.num_tokens,
            "metrics": {"bits_per_byte": {"value": one.bits_per_byte}},
            "vocab_size": one.vocab_size,
            "bytes_per_token": one.bytes_per_token,
            "unique_tokens": one.unique_tokens,
            "entropy_bits_per_byte": one.entropy,
        }
        for index, one in enumerate(runs)
    ]
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": [*rows, {"name": "late", "metrics": None}]}))
    return folder


def test_command_writes_a_law_that_the_planner_reads(tmp_path, capsys):
    folder = write_sweep(tmp_path / "sweep", make_runs())
    assert read_runs([folder]) == {"stories": make_runs()}
    run("scaling", ["--runs", str(folder), "--output", str(tmp_path / "new" / "mine.json")])
    printed = capsys.readouterr().out
    assert "stories: L = E + A / N^alpha + B / D^beta, 16 runs; E = 0.299" in printed
    assert "| parameters | tokens | budget / largest fitted | predicted | reached | error |" in printed
    assert (tmp_path / "new" / "mine.png").read_bytes().startswith(b"\x89PNG")
    law = load_laws(tmp_path / "new" / "mine.json")["stories"]
    assert law.bits_per_byte(1e6, 1e6) == pytest.approx(loss(1e6, 1e6), rel=0.003)
    record = json.loads((tmp_path / "new" / "mine.json").read_text())["stories"]
    exponent = record["terms"]["tokens"]["exponent"]
    assert exponent["low"] <= exponent["value"] <= exponent["high"]
    provenance = record["provenance"]
    assert provenance["sources"][0]["runs"] == str(folder) and provenance["versions"]["torch"]
    assert len(provenance["runs"]) == 16 and record["check"]["num_fitted"] < 16


def test_law_of_other_data_in_the_file_stays(tmp_path):
    shutil.copy(LAW_FILE, tmp_path / "law.json")
    before = load_laws(LAW_FILE)
    folder = write_sweep(tmp_path / "sweep", make_runs())
    fit_laws(ScalingArgs(runs=str(folder), output=tmp_path / "law.json"))
    after = load_laws(tmp_path / "law.json")
    assert after["builtin"] == before["builtin"] and after["stories"] != before["stories"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], r"runs \(.*sweep\): has no finished run; run the sweep first"),
        (make_runs()[:6], "runs: those of stories do not determine a law: 2 different sizes.*; add runs"),
        (make_runs()[::4], "do not determine a law: only parameters vary; size and tokens must both vary"),
    ],
)
def test_runs_without_a_law_are_rejected_and_nothing_is_written(runs, message, tmp_path):
    folder = write_sweep(tmp_path / "sweep", runs)
    with pytest.raises(UserError, match=message):
        fit_laws(ScalingArgs(runs=str(folder), output=tmp_path / "law.json"))
    assert not (tmp_path / "law.json").exists()


def test_invalid_input_is_rejected(tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"metrics": {"bits_per_byte": {"value": 1}}}]}')
    with pytest.raises(UserError, match=r"has a run without 'num_non_embedding_parameters', of an earlier"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match=r"runs \(.*none\): must be the output_dir of a sweep"):
        read_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=r"runs \(\[\]\): must name the folder of a sweep"):
        parse(ScalingArgs, [])
    with pytest.raises(UserError, match=r"held_out_factor \(1.0\): must be above 1; try 3"):
        parse(ScalingArgs, ["--runs", "a", "--held_out_factor=1"])
    folder = write_sweep(tmp_path / "sweep", make_runs())
    (tmp_path / "law.json").write_text('{"stories": {}}')
    with pytest.raises(UserError, match=r"law \(.*law.json\): is not a file of laws"):
        fit_laws(ScalingArgs(runs=str(folder), output=tmp_path / "law.json"))
    for args in (StoryArgs, TrainCommandArgs):
        with pytest.raises(UserError, match=r"law \(mine.json\): has no effect without minutes"):
            parse(args, ["--law=mine.json"])


def values_of(path: Path) -> dict[str, dict]:
    records = json.loads(path.read_text())
    for record in records.values():
        del record["provenance"]["date"], record["provenance"]["versions"], record["provenance"]["command"]
    return records


def test_shipped_law_is_that_of_the_results(tmp_path, monkeypatch):
    """Values within 0.5%, bounds within 5% of the value: other sums move the grid of the search."""
    shipped = json.loads(LAW_FILE.read_text())
    command = shipped["stories"]["provenance"]["command"]
    assert command == COMMANDS[-1]
    monkeypatch.chdir(ROOT)
    args = parse(ScalingArgs, shlex.split(command)[2:])
    assert ROOT / args.output == LAW_FILE
    fit_laws(replace(args, output=tmp_path / "law.json", plot=tmp_path / "law.png"))
    found, expected = values_of(tmp_path / "law.json"), values_of(LAW_FILE)
    for name, record in expected.items():
        assert found[name]["provenance"] == record["provenance"]
        for term in ("parameters", "tokens"):
            for constant, tolerance in (("exponent", 0.05), ("factor", 0.5)):
                ours, theirs = found[name]["terms"][term][constant], record["terms"][term][constant]
                assert ours["value"] == pytest.approx(theirs["value"], rel=0.005)
                assert ours["low"] == pytest.approx(theirs["low"], abs=tolerance * theirs["value"])
        assert found[name]["check"].get("num_fitted") == record["check"].get("num_fitted")


def test_sweep_of_the_page_runs_before_the_fit(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    swept = []

    def write(args: SweepArgs) -> None:
        swept.append(args)
        write_sweep(args.output_dir, make_runs())

    monkeypatch.setattr(fit_command, "sweep", write)
    run_sweep, read_sweep, _ = COMMANDS
    run("scaling", shlex.split(run_sweep)[2:])
    assert len(expand_sweep(swept[0])) == 28
    assert load_laws(Path("runs/scaling/law.json"))["stories"].vocab_size == 4096
    run("scaling", shlex.split(read_sweep)[2:])
    assert len(swept) == 1


def test_runs_of_the_sweep_have_the_options_of_the_planner(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse(SweepArgs, ["--config", "configs/sweeps/scaling.yaml"])
    for one in expand_sweep(args):
        config, train = one.config, one.config.train
        options = training_options(
            (config.model.num_hidden_layers, config.model.hidden_size), train.max_steps
        )
        del options["train.max_steps"], options["train.eval_stories"]
        found = {}
        for name in options:
            section, _, option = name.partition(".")
            found[name] = getattr(getattr(config, section), option)
        assert found == options, one.name
        assert train.batch_size == (8 if train.max_steps * train.batch_size * 256 <= 2e6 else 16)
        assert re.fullmatch(
            r"\d x \d+, (?:[\d.]+ M tokens|vocabulary \d+|\d+ stories)", one.labels["variant"]
        )

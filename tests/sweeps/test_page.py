"""docs/sweeps.md and docs/recipe.md: their commands run as they stand, on the built-in corpus."""

import re
import shlex

import pytest
from conftest import ROOT

from tinystories_slm.commands import run
from tinystories_slm.config import parse
from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.sweeps.grid import expand_sweep
from tinystories_slm.sweeps.results import check_metrics

PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for page in (PAGE, (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"))
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if "sweep.py" in line
]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lists_its_runs(line, capsys):
    program, script, *args = shlex.split(line)
    assert (program, script) == ("python", "scripts/sweep.py")
    run("sweep", [arg.replace("PATH", "builtin") for arg in args if arg != "--list"] + ["--list"])
    number = {"tiny": 4, "recipe": 30, "packing": 18}[re.search(r"sweeps/(\w+)\.yaml", line)[1]]
    if "--only" in args:
        number = 2
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{number} to run, ")


def test_commands_of_the_page_are_those_that_are_tested():
    assert len(COMMANDS) == 5


@pytest.mark.weekly
def test_first_sweep_of_the_page_trains_four_models(work, commands, capsys):
    [line] = [line for line in COMMANDS if line.endswith("tiny.yaml")]
    run("sweep", shlex.split(line)[2:])
    assert [name for name, _ in commands.started] == ["prepare_data", *["train", "evaluate"] * 4]
    printed = capsys.readouterr().out
    assert printed == (work / "runs" / "sweep_tiny" / "sweep.md").read_text()
    assert "4 of 4 runs are finished." in printed and "law of bits per byte" in printed
    assert {path.name for path in (work / "runs" / "sweep_tiny").glob("*.png")} == {
        "heat_map_bits_per_byte.png", "heat_map_loss.png", "curve_bits_per_byte.png",
    }  # fmt: skip


def test_sweep_file_of_the_page_is_valid(work):
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (work / "mine.yaml").write_text(text, encoding="utf-8")
    args = parse(SweepArgs, ["--config", "mine.yaml"])
    check_metrics(args)
    runs = expand_sweep(args)
    assert len(runs) == 24 and "24 here" in PAGE
    assert {run.config.train.lr for run in runs} == {3.5e-3, 7e-3}


def test_estimate_prints_a_time_for_each_model(capsys):
    run("sweep", ["--config", "configs/sweeps/tiny.yaml", "--seeds", "0", "1", "--estimate"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": about ")[0] for line in lines[:-1]] == [
        f"hidden_size_{size}-num_hidden_layers_{layers}-seed_0" for size in (16, 32) for layers in (1, 2)
    ]
    assert lines[-1].startswith("8 runs: about ")

"""The console script and the scripts of the same names."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from script_process import run_forked

import tinystories_slm
from tinystories_slm.commands import COMMANDS

NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "


def console(*args: str) -> subprocess.CompletedProcess:
    return run_forked(["-m", "tinystories_slm", *args], ROOT)


def test_every_script_is_a_command_and_every_command_a_script():
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == set(COMMANDS)
    for name in COMMANDS:
        lines = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 6 and lines[-1] == f'    run("{name}")'


def test_help_and_rejected_options_import_neither_torch_nor_transformers():
    code = f"""{NO_TORCH}
sys.argv[0] = "tinystories-slm"
from tinystories_slm.commands import COMMANDS, run
for name in COMMANDS:
    sys.argv = [name, "--help"]
    try: run(name)
    except SystemExit as stop: assert not stop.code
    sys.argv = [name, "--rejected=1"]
    try: run(name)
    except SystemExit as stop: assert stop.code == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: {name}" in done.stdout
    assert done.stdout.count("\n  --config ") == len(COMMANDS)
    assert done.stderr.count("error: unknown option 'rejected'") == len(COMMANDS)


@pytest.mark.parametrize(
    ("program", "is_command"),
    [
        ("tinystories-slm", True),
        (str(ROOT / "scripts" / "train.py"), True),
        ("-m", True),  # while `python -m tinystories_slm` imports the package
        ("train.py", False),
        (str(ROOT / "mine" / "scripts" / "train.py"), False),
        ("-c", False),
        ("", False),
    ],
)
def test_only_commands_register_the_model_later(program, is_command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    assert tinystories_slm._is_command() == is_command


def test_the_console_script_lists_its_commands_and_runs_one(tmp_path):
    overview = console("--help")
    assert overview.returncode == 0
    assert [line.split()[0] for line in overview.stdout.splitlines()[2:]] == list(COMMANDS)
    unknown = console("trian")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: unknown command 'trian'")
    folders = [f"--data.data_dir={tmp_path / 'data'}", "--data.max_stories=20"]
    done = console("download-data", "--config=configs/debug.yaml", *folders)
    assert done.returncode == 0, done.stderr
    assert "train.parquet: " in done.stdout and "next: train_tokenizer" in done.stdout


def test_an_option_that_does_not_exist_ends_in_one_line():
    done = run_script("report.py", "--rnu=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown option 'rnu'") and done.stderr.count("\n") == 1


def test_a_script_does_not_hide_the_library_evaluate():
    code = (
        "import runpy, sys; sys.argv = ['scripts/evaluate.py']; sys.path.insert(0, 'scripts')\n"
        "from tinystories_slm.commands import run\n"
        "try: run('evaluate', ['--model=x'])\n"
        "except SystemExit: pass\n"
        "import evaluate; print(hasattr(evaluate, 'Metric'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_python_m_runs_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "tinystories_slm", "--help"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage: tinystories-slm COMMAND")


@pytest.mark.parametrize("rank", ["", "1", "first"])
def test_a_stray_rank_hides_no_error(rank, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    done = run_script("report.py", "--run=absent")
    assert done.returncode == 2 and done.stderr.startswith("error: run (absent)"), done.stderr


def test_stray_ranks_hide_no_error_of_training():
    code = (
        "import os; from tinystories_slm.commands import run\n"
        "for variables in ({'RANK': '', 'LOCAL_RANK': '', 'WORLD_SIZE': ''}, {'RANK': '1'},\n"
        "                  {'RANK': '8', 'LOCAL_RANK': '0', 'WORLD_SIZE': '16', 'MASTER_ADDR': 'x'}):\n"
        "    os.environ.update(variables)\n"
        "    try: run('train', ['--train.max_steps=0'])\n"
        "    except SystemExit as end: print(end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == ["2"] * 3 and done.stderr.count("error: train.max_steps (0)") == 3, (
        done.stderr
    )


def test_h_of_another_program_does_not_keep_the_model_from_being_registered():
    code = (
        "import sys; sys.argv = ['serve.py', '-h', '0.0.0.0']; import tinystories_slm\n"
        "from transformers import AutoConfig; print(AutoConfig.for_model('tinystories_slm').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "tinystories_slm", done.stderr


def test_publishing_does_not_import_matplotlib():
    code = "import sys, tinystories_slm.hub.push; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "False", done.stderr

"""The package as a wheel, installed into an environment without this checkout, in another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.version import Version

pytestmark = [
    pytest.mark.skipif(Version(version("setuptools")) < Version("77"), reason="needs setuptools 77"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout, to know its files"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as an index does it: a source archive of what git does not ignore, and a wheel of that
    archive."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and not name.startswith(("benchmarks/", "docs/", "tests/")) and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    sdist = "from setuptools import build_meta; build_meta.build_sdist('../sdist')"
    subprocess.run(
        [sys.executable, "-c", sdist], cwd=folder / "source", check=True, capture_output=True, timeout=120
    )
    [archive] = (folder / "sdist").glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, str(folder), str(archive)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The console script in a fresh environment: the wheel's files, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = folder / "bin" / "tinystories-slm"
    command.write_text(f"#!{python}\nfrom tinystories_slm.commands import main\nmain()\n")
    command.chmod(0o755)
    return command


# One Python imports the libraries, and a child of it runs each command.
COMMANDS_IN_CHILDREN = """
import json, os, sys, traceback
import tinystories_slm.commands.quickstart, tinystories_slm.doctor, tinystories_slm.export
import tinystories_slm.hub.push
from tinystories_slm.commands import main

for arguments in json.loads(sys.argv[1]):
    print("command", *arguments, flush=True)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            sys.argv = ["tinystories-slm", *arguments]
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"exit code {code}")
"""


def run_in(folder: Path, *command: str | Path, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_what_the_commands_need_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "resources/model_card.md", "resources/configs/quickstart.yaml",
        "resources/configs/accelerate/cpu_2.yaml", "export/web/index.html", "export/web/generate.js",
        "kernels/dtypes.h", "kernels/training/kernels.c",
        "kernels/decoding/kernels.c", "runs/report.html.jinja", "runs/page.css", "runs/page.js",
        "data_report/data_report.html.jinja", "data_report/card.md.jinja",
        "kernels/decoding/kernels.c", "runs/report.html.jinja", "runs/base.html.jinja",
        "report_card/card.html.jinja", "report_card/prompts_v1.txt",
    ):  # fmt: skip
        assert f"tinystories_slm/{name}" in names, name
    assert all(name.startswith(("tinystories_slm/", "tinystories_slm-")) for name in names)


@pytest.mark.slow
def test_every_command_runs_from_the_wheel(installed, tmp_path):
    where = run_in(
        tmp_path, installed.parent / "python", "-c", "import tinystories_slm as t; print(t.__file__)"
    )
    assert str(installed.parents[1]) in where
    debug = [
        "--config",
        "configs/debug.yaml",
        "--train.max_steps=6",
        "--output_dir=run",
        "--data.data_dir=data",
    ]
    best = "run/best"
    commands = [
        ["download_data", *debug],
        ["train_tokenizer", *debug],
        ["prepare_data", *debug],
        ["data_report", *debug],
        ["doctor", *debug],
        ["train", *debug],
        ["story", *debug],
        ["evaluate", "--model", best, "--data=builtin", "--max_stories=3"],
        ["generate", "--model", best, "--max_new_tokens=8"],
        ["export", "--model", best, "--format=native", "--output=native"],
        ["export", "--model", best, "--format=onnx", "--output=page"],
        ["report", "--run=run"],
        ["report_card", "--model", best, "--num_stories=10", "--max_new_tokens=8", "--output=run/card.html"],
        ["push_to_hub", "--run=run", "--repo_id=tester/tales", "--dry_run"],
    ]
    run_in(tmp_path, installed, "report", "--run=absent", code=2)
    run_in(tmp_path, installed.parent / "python", "-c", COMMANDS_IN_CHILDREN, json.dumps(commands))

    assert (tmp_path / "page" / "index.html").is_file() and (tmp_path / "run" / "report.html").is_file()
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" in card
    assert "Longest copied run" in (tmp_path / "run" / "card.html").read_text(encoding="utf-8")
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "tinystories_slm"

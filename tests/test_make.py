"""`make` with stub programs in place of Python: which arguments reach them, and when it installs."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

STUB = """#!/bin/sh
printf '%s\\0' "$@" >> arguments
printf '\\0' >> arguments
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and an installed environment whose Python records its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "install.py"):
        (tmp_path / name).touch()
    write_stub(tmp_path / ".venv" / "bin" / "python")
    write_stub(tmp_path / "stub python")
    for name in ("installed", "installed-dev"):
        (tmp_path / ".venv" / name).touch()
    (tmp_path / ".venv" / "root").write_text(f"{tmp_path.resolve()}\n")
    return tmp_path


def write_stub(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(checkout: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """Run make and return the arguments of every started Python."""
    (checkout / "arguments").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", *arguments, "PYTHON='./stub python'"]
    done = subprocess.run(
        command, cwd=checkout, env=environment | variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    calls = (checkout / "arguments").read_text().split("\0\0")
    return [call.split("\0") for call in calls if call]


@pytest.mark.parametrize(
    "source",
    [
        "stories.txt",
        "..",
        "it's",
        '"quoted"',
        "$HOME/x",
        "$(shell touch made)",
        "`touch made`",
        "a b;touch made",
        "--help",
        "roneneldan/TinyStories",
        "Zoë #1\\",
    ],
)
def test_data_reaches_the_program_as_one_argument(checkout, source):
    expected = ["scripts/story.py", f"--data.source={source}"]

    assert make(checkout, "story", f"DATA={source}") == [expected]
    assert make(checkout, "story", DATA=source) == [expected]
    assert not (checkout / "made").exists()


def test_builtin_is_the_default_source(checkout):
    for arguments in ((), ("DATA=",), ("DATA=builtin",)):
        [call] = make(checkout, "story", *arguments)
        assert call[-1] == "--data.source=builtin"
    [call] = make(checkout, "story", "MORE=10", "MINUTES=5")
    assert call[-3:] == ["--data.source=builtin", "--minutes=5", "--more=10"]


def test_make_installs_again_only_when_needed(checkout):
    program = checkout / ".venv" / "bin" / "python"
    assert [call[0] for call in make(checkout, "story")] == ["scripts/story.py"]

    assert make(checkout, "story", "TORCH=it's")[0] == ["install.py", "--torch=it's"]

    # An hour ago: two files that are written at once may have the same time.
    installed = (checkout / ".venv" / "installed").stat().st_mtime - 3600
    os.utime(checkout / ".venv" / "installed", (installed, installed))
    os.utime(checkout / "setup.cfg")
    assert make(checkout, "story")[0] == ["install.py", "--torch="]
    assert len(make(checkout, "story")) == 1

    # A Python that was removed, as after an upgrade of the system.
    program.rename(checkout / "python")
    program.symlink_to(checkout / "removed")
    done = subprocess.run(["make", "--dry-run", "story"], cwd=checkout, capture_output=True, text=True)
    assert "install.py" in done.stdout, done


def test_make_installs_again_in_a_copied_project(checkout, tmp_path_factory):
    copied = tmp_path_factory.mktemp("a b") / "it's $HOME"
    shutil.copytree(checkout, copied)
    assert make(copied, "story")[0] == ["install.py", "--torch="]
    assert make(copied, "test")[0] == ["install.py", "--extra", "dev", "--torch="]
    assert len(make(checkout, "story")) == 1


def test_make_test_installs_everything_once(checkout):
    (checkout / ".venv" / "installed").unlink()
    (checkout / ".venv" / "installed-dev").unlink()

    first, tests = make(checkout, "test")
    assert first == ["install.py", "--extra", "dev", "--torch="]
    assert tests[:2] == ["-m", "pytest"]
    assert len(make(checkout, "story")) == 1


def test_clean_keeps_data_and_runs(checkout):
    for name in ("data", "runs"):
        (checkout / name).mkdir()
    make(checkout, "clean")

    assert {path.name for path in checkout.iterdir()} >= {"data", "runs"}
    assert not (checkout / ".venv").exists()

"""install.py with stub programs: interrupted environments, and the choice of the build of torch."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT


class Machine:
    """Stands in for the programs that install.py starts: their effects, and the commands in order."""

    def __init__(self, folder: Path):
        self.commands: list[str] = []
        self.reachable_builds: set[str] = set()
        self.has_torch = False
        self.interrupt_at = ""
        self.python, self.pip = folder / ".venv/bin/python", folder / ".venv/pip"

    def succeeds(self, *command: str) -> bool:
        line = " ".join(command)
        if "--dry-run" in command:
            self.commands.append(line)
            return command[command.index("--torch-backend") + 1] in self.reachable_builds
        if "importlib.metadata" in line:
            return self.has_torch
        return self.pip.exists() if "-m pip" in line else self.python.exists()

    def run(self, *command: str) -> None:
        line = " ".join(command)
        self.commands.append(line)
        if "-m venv" in line:
            self.python.parent.mkdir(parents=True, exist_ok=True)
            self.python.touch()
        if self.interrupt_at and self.interrupt_at in line:
            raise KeyboardInterrupt
        if "-m venv" in line or "-m ensurepip" in line:
            self.pip.touch()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The module install.py in an empty checkout, on Linux without an NVIDIA driver."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    machine = Machine(tmp_path)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "install.py"))
    monkeypatch.setattr(module, "run", machine.run)
    monkeypatch.setattr(module, "succeeds", machine.succeeds)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.chdir(tmp_path)

    def install(*arguments: str) -> list[str]:
        """Install, and return the commands that were run."""
        machine.commands.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["install.py", *arguments])
            module.main()
        machine.has_torch = True
        return list(machine.commands)

    return SimpleNamespace(install=install, machine=machine, module=module, folder=tmp_path)


PACKAGE = "-m pip --disable-pip-version-check install -c constraints.txt -e ."


def test_first_installation_creates_the_environment(program, capsys):
    program.machine.reachable_builds = {"cpu"}
    commands = program.install("--extra", "dev")

    assert commands[0].endswith("-m venv .venv")
    assert commands[-1].endswith(PACKAGE + "[dev]")
    assert not (program.folder / ".venv" / "unfinished").exists()
    assert not any("-m venv" in command for command in program.install())


def test_environment_of_a_moved_or_copied_project_is_created_again(program, capsys):
    """Its `-e` install would run the code of the other folder."""
    program.install()
    root = program.folder / ".venv" / "root"
    assert root.read_text() == f"{program.folder}\n"
    root.write_text("/somewhere/else\n")
    left = program.folder / ".venv" / "left"
    left.touch()
    commands = program.install()
    assert commands[0].endswith("-m venv .venv") and commands[-1].endswith(PACKAGE)
    assert not left.exists() and root.read_text() == f"{program.folder}\n"
    assert "creating .venv again: it was created in /somewhere/else" in capsys.readouterr().out


@pytest.mark.parametrize("interrupt_at", ["-m venv", PACKAGE])
def test_interrupted_installation_starts_again(program, interrupt_at, capsys):
    program.machine.interrupt_at = interrupt_at
    with pytest.raises(SystemExit) as stop:
        program.install()
    assert stop.value.code == 130
    left = program.folder / ".venv" / "half"
    left.touch()
    program.machine.interrupt_at = ""
    commands = program.install()

    assert commands[0].endswith("-m venv .venv") and commands[-1].endswith(PACKAGE)
    assert not left.exists()
    assert "the last installation was interrupted" in capsys.readouterr().out


def test_environment_without_pip_gets_pip_and_keeps_its_files(program):
    # As `python3 -m venv` of Debian leaves it without python3-venv, or `uv venv` makes it.
    program.machine.python.parent.mkdir(parents=True)
    program.machine.python.touch()
    mine = program.folder / ".venv" / "mine"
    mine.touch()
    commands = program.install()

    assert commands[0].endswith("-m ensurepip --upgrade") and commands[-1].endswith(PACKAGE)
    assert mine.exists()


def test_link_to_a_removed_python_is_replaced(program):
    program.machine.python.parent.mkdir(parents=True)
    program.machine.python.symlink_to(program.folder / "removed")
    commands = program.install()

    assert commands[0].endswith("-m venv .venv")
    assert program.machine.python.exists() and not program.machine.python.is_symlink()


def test_python_without_ensurepip_is_one_line_and_creates_nothing(program, monkeypatch, capsys):
    monkeypatch.setattr(program.module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        program.install()

    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: PYTHON (") and "apt install python3." in line
    assert not (program.folder / ".venv").exists()


def test_older_python_prints_the_required_version(program, monkeypatch, capsys):
    source = (ROOT / "install.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    monkeypatch.setattr(program.module.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit):
        program.install()

    assert "must be Python 3.11 or newer; use make story PYTHON=python3.12" in capsys.readouterr().err
    assert not (program.folder / ".venv").exists()


def torch_commands(commands: list[str]) -> list[str]:
    return [command for command in commands if command.endswith((" torch", " --reinstall"))]


def test_machine_without_nvidia_driver_gets_the_cpu_build(program, capsys):
    program.machine.reachable_builds = {"cpu"}
    [command] = torch_commands(program.install())

    assert "--torch-backend cpu --no-deps" in command and "uv pip install" in command
    assert "torch: the cpu build; TORCH=default selects" in capsys.readouterr().out
    assert torch_commands(program.install()) == []

    [command] = torch_commands(program.install("--torch=default"))
    assert "pip" in command and "--force-reinstall" in command
    assert torch_commands(program.install("--torch=default")) == []
    assert torch_commands(program.install()) == []


def test_unreachable_index_falls_back_to_that_of_pip(program, capsys):
    commands = program.install()

    assert torch_commands(commands) == [] and commands[-1].endswith(PACKAGE)
    assert "because the index of cpu builds cannot be reached" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["driver", "macos", "windows", "chosen"])
def test_other_machines_get_the_build_of_pips_index(program, monkeypatch, capsys, change):
    program.machine.reachable_builds = {"cpu"}
    if change == "driver":
        monkeypatch.setattr(program.module.shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    elif change != "chosen":
        monkeypatch.setattr(program.module.sys, "platform", {"macos": "darwin", "windows": "win32"}[change])
    commands = program.install(*(["--torch=default"] if change == "chosen" else []))

    assert torch_commands(commands) == []
    assert "torch: the build of pip's index\n" in capsys.readouterr().out


def test_failed_command_is_named_in_the_last_line(program, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(program.module.subprocess, "call", lambda *args, **options: 7)
        spec = importlib.util.spec_from_file_location("unpatched", ROOT / "install.py")
        unpatched = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(unpatched)
        with pytest.raises(unpatched.InstallError, match=r"^python -m pip install \(exit code 7\)"):
            unpatched.run("python", "-m", "pip", "install", "-e", ".")


def test_no_file_names_the_host_of_an_index():
    for name in ("Makefile", "install.py", "setup.cfg", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "download." not in text and "://pypi" not in text, name

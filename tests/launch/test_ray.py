"""launch/ray/prepare.py, with a substitute for Ray that runs each task at once."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT


def test_shards_are_tasks_between_tokenizer_and_merge(tmp_path, monkeypatch):
    commands, limits = [], []

    def record(command: list[str], *, cwd: Path, check: bool) -> None:
        assert (command[0], cwd, check) == (sys.executable, tmp_path, True)
        commands.append([Path(command[1]).relative_to(ROOT).as_posix(), *command[2:]])

    ray = SimpleNamespace(
        init=lambda num_cpus: limits.append(num_cpus),
        remote=lambda **options: lambda function: SimpleNamespace(remote=function),
        get=lambda tasks: limits.append(len(tasks)),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.chdir(tmp_path)
    options = ["--config", "own.yaml", "--data.max_stories", "9"]
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", *options[:2], "--num_shards", "3", "--num_cpus", "2", *options[2:]]
    )
    runpy.run_path(str(ROOT / "launch" / "ray" / "prepare.py"), run_name="__main__")
    assert limits == [2, 3]
    assert commands == [
        ["scripts/train_tokenizer.py", *options],
        *(["scripts/prepare_data.py", *options, "--shard", f"{rank}/3"] for rank in range(3)),
        ["scripts/prepare_data.py", *options, "--merge_shards", "3"],
    ]


def test_no_shards_are_rejected(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--num_shards", "0"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "launch" / "ray" / "prepare.py"), run_name="__main__")
    assert error.value.code == 2
    assert "num_shards (0): must be at least 1" in capsys.readouterr().err

"""Sweeps whose commands run in forked processes, which need not import the libraries again."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from script_process import IS_FORKED, run_python
from script_process import processes as forks

from tinystories_slm.sweeps import processes


@dataclass
class Commands:
    """Commands that the sweep has started, in order."""

    started: list[tuple[str, Path]] = field(default_factory=list)
    """Name of the command, and the folder of its run."""
    on_poll: Callable[[], None] = lambda: None
    """Called each time that the sweep looks whether a process has ended."""


@pytest.fixture
def commands(monkeypatch) -> Commands:
    """Replace the processes of the sweep by forked ones, and record them."""
    if not IS_FORKED:
        pytest.skip("forked processes need Linux")
    record = Commands()

    class ForkedPopen:
        def __init__(self, argv, *, stdout, env, **_):
            name, flags = argv[3], argv[4:]
            output = Path(next(flag for flag in flags if flag.startswith("--output")).partition("=")[2])
            record.started.append((name, output if name in ("train", "prepare_data") else output.parent))
            command, log = ["-m", "tinystories_slm", name, *flags], str(Path(stdout.name).resolve())
            self._process = forks.Process(target=run_python, args=(command, os.getcwd(), env, log, log))
            self._process.start()

        def poll(self):
            record.on_poll()
            self._process.join(0)
            return self._process.exitcode

        def wait(self):
            self._process.join()

        def terminate(self):
            self._process.terminate()

        def kill(self):
            self._process.kill()

    monkeypatch.setattr(processes.subprocess, "Popen", ForkedPopen)
    return record

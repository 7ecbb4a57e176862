"""Scripts in processes of their own that need not import the libraries: a fork server has imported them.

A new Python takes about 5 s of CPU time to import torch and transformers. Tests about imports, variables that
libraries read at import, launchers and signals start a new Python all the same.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

IS_FORKED = sys.platform == "linux"  # forked processes crash in system libraries of macOS
processes = multiprocessing.get_context("forkserver" if IS_FORKED else "spawn")
"""Starts a process with torch and this package imported, and nothing else done."""
processes.set_forkserver_preload(
    [
        "tinystories_slm.commands.quickstart",
        "tinystories_slm.doctor",
        "tinystories_slm.export",
        "tinystories_slm.hub.push",
        "accelerate.commands.launch",
    ]
)


def run_forked(
    command: Sequence[str | Path], cwd: Path, *, timeout: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run `script, *arguments` or `-m, module, *arguments`, as `subprocess.run` runs `python script ...`."""
    command = list(map(str, command))
    environment = dict(os.environ if env is None else env)
    if not IS_FORKED:
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = processes.Process(target=run_python, args=(command, str(cwd), environment, *outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in outputs)
        return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def run_python(command: list[str], cwd: str, environment: dict[str, str], *outputs: str) -> None:
    """Run `command` in this process; standard output and error are appended to the files `outputs`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    is_module = command[0] == "-m"
    sys.argv = command[1:] if is_module else command
    sys.path.insert(0, cwd if is_module else os.path.dirname(command[0]))
    try:
        if is_module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing ends without them

"""Commands without what Windows lacks: modules, signals and functions of the system, UTF-8 on a pipe."""

import os
import subprocess
import sys

from conftest import ROOT

# The libraries keep what they need of this system: only modules of this package see Windows.
WINDOWS = """
import builtins, importlib, os, signal, sys
import accelerate, datasets, evaluate, filelock, psutil, torch, transformers

imports = builtins.__import__
def import_as_windows(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("tinystories_slm") and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return imports(name, globals, *args, **kwargs)

builtins.__import__ = import_as_windows
for name in ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
    delattr(signal, name)
for name in ("fchmod", "fork", "geteuid", "getloadavg", "getuid", "killpg", "sched_getaffinity"):
    delattr(os, name)
for name in ("RTLD_NOLOAD", "RTLD_DEEPBIND"):
    delattr(os, name)
torch.set_num_threads(1)

from tinystories_slm.commands import COMMANDS
for command in COMMANDS.values():
    for reference in (command.function, command.args):
        module, name = reference.split(":")
        getattr(importlib.import_module(module), name)
print(len(COMMANDS), "commands")

from tinystories_slm.config import parse_config
from tinystories_slm.config.command_args.doctor import DoctorArgs
from tinystories_slm.doctor import doctor, numerics
from tinystories_slm.commands.cli import run_command
numerics.check_attention = numerics.check_compile = lambda *_: ()
flags = sys.argv[1:]
run_command(doctor, DoctorArgs, flags)

from tinystories_slm.training.loop import train
train(parse_config([*flags, "--train.max_steps", "2"]))
print("step 2")
"""


def test_commands_doctor_and_training_work_without_what_windows_lacks(tmp_path):
    flags = [
        f"--config={ROOT}/configs/debug.yaml", f"--data.data_dir={tmp_path}/data",
        f"--output_dir={tmp_path}/run",
        "--data.max_stories=100", "--tokenizer.vocab_size=300", "--data.seq_len=32", "--model.hidden_size=32",
        "--model.num_attention_heads=2", "--train.batch_size=4", "--train.warmup_steps=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        timeout=300,
    )
    lines = done.stdout.split("\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].endswith(" commands") and "0 problems" in lines and lines[-2] == "step 2"
    assert "page faults" not in done.stdout  # nothing counts them
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()

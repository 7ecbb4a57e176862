"""What every command has in common: standard streams that fail, and errors of the machine in one line."""

import errno
import io
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from tinystories_slm.commands.cli import run_command
from tinystories_slm.config.command_args.reports import ReportArgs

_STDOUT = "standard output or a temporary file"


def run(monkeypatch, capsys, main) -> tuple[int, str]:
    """(exit code, last line of standard error) of a command that calls `main`."""
    try:
        run_command(lambda args: main(), ReportArgs, [])
    except SystemExit as end:
        lines = capsys.readouterr().err.splitlines()
        return end.code, lines[-1] if lines else ""
    return 0, ""


def raising(error: Exception):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/a.txt"),
            "error: /data/a.txt (Permission denied); use another path",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
            f"error: {'a' * 300} (File name too long); use a shorter name",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to get\n9 bytes."),
            "error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried to get 9 bytes.); "
            "use a smaller batch size or a smaller model",
        ),
        (MemoryError(), "error: out of memory; use a smaller batch size or a smaller model"),
        (
            Exception("No space left on device (os error 28)"),  # of tokenizers
            f"error: {_STDOUT} cannot be written to (No space left on device (os error 28)); free disk space",
        ),
    ],
)
def test_an_error_of_the_machine_is_one_line(monkeypatch, capsys, error, line):
    assert run(monkeypatch, capsys, raising(error)) == (2, line)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "", "a"), KeyError("a"), RuntimeError("a")]
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error)):
        run(monkeypatch, capsys, raising(error))


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"Zo\\xeb \\u0142"), ("cp1252", b"Zo\xeb \\u0142")]
)
def test_a_letter_that_stdout_lacks_is_printed_as_an_escape(monkeypatch, capsys, encoding, expected):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    assert run(monkeypatch, capsys, lambda: print("Zoë ł", end="")) == (0, "")
    assert printed.getvalue() == expected


_PROGRAM = """
import sys
sys.argv[0] = "tinystories-slm"  # as a command: the package does not import torch
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config.command_args.reports import ReportArgs
def main(args):
    open(sys.argv[1], "w").close()
    print("a story", len(sys.stdin.read()))
    print("a log line", file=sys.stderr)
run_command(main, ReportArgs, [])
"""


def test_closed_and_full_standard_streams(tmp_path):
    (tmp_path / "program.py").write_text(_PROGRAM)
    script = """
        python="$0"
        "$python" program.py a >&- </dev/null; echo "closed stdout: $?" >&2
        "$python" program.py b <&-; echo "closed stdin: $?" >&2
        "$python" program.py c 2>&- </dev/null; echo "closed stderr: $?" >&2
        "$python" program.py d >/dev/full </dev/null; echo "full stdout: $?" >&2
    """
    done = subprocess.run(
        ["bash", "-c", textwrap.dedent(script), sys.executable],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.stderr.splitlines() == [
        "a log line", "closed stdout: 0",
        "a log line", "closed stdin: 0",
        "closed stderr: 0",
        "a log line",
        f"error: {_STDOUT} cannot be written to (No space left on device); free disk space",
        "full stdout: 2",
    ]  # fmt: skip
    assert done.stdout == "a story 0\n" * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "program.py"]

"""Each writing system call of a command fails once: one line, the earlier file stays, a retry works."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_model

from tinystories_slm.commands import cli
from tinystories_slm.commands.generate import generate
from tinystories_slm.config import save_config
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.config.command_args.reports import ReportArgs
from tinystories_slm.export.exporters import export
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.runs.report import report

_ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class FailingCalls:
    """Make the n-th open for writing, fsync or rename below `folder` fail with `number`."""

    def __init__(self, folder: Path, n: int, number: int):
        self.folder, self.n, self.number, self.num_calls = str(folder), n, number, 0

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = io.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._wrap(opened, is_open=True))
        for name in ("fsync", "replace", "rename", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable, *, is_open: bool = False) -> Callable:
        def failing(target, *args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            mode = str(kwargs.get("mode", args[0] if args else "r")) if is_open else "w"
            if str(path).startswith(self.folder) and set(mode) & set("wax+"):
                self.num_calls += 1
                if self.num_calls == self.n:
                    raise OSError(self.number, os.strerror(self.number), str(path))
            return call(target, *args, **kwargs)

        return failing


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> Path:
    return save_model_folder(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "best")


@pytest.fixture
def commands(tmp_path, tiny_run, model_folder) -> dict[str, tuple[Callable, type, list[str], Path]]:
    """The function, class of options, options and output file of each command."""
    save_config(tiny_run(), tmp_path / "config.yaml")
    model = ["--model", str(model_folder)]
    stories, exported = tmp_path / "stories.jsonl", tmp_path / "exported"
    return {
        "report": (report, ReportArgs, ["--run", str(tmp_path)], tmp_path / "report.html"),
        "generate": (
            generate,
            GenerateArgs,
            [*model, "--output", str(stories), "--max_new_tokens", "2", "--seed", "1"],
            stories,
        ),
        "export": (
            export,
            ExportArgs,
            [*model, "--format", "custom", "--output", str(exported)],
            exported / "export.json",
        ),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc for the path of a descriptor")
@pytest.mark.parametrize("name", ["report", "generate", pytest.param("export", marks=pytest.mark.slow)])
def test_each_failing_call_is_one_line_and_the_next_try_works(tmp_path, commands, capsys, name):
    function, args_type, argv, output = commands[name]
    cli.run_command(function, args_type, argv)
    earlier, numbers = output.read_bytes(), list(_ERRORS)
    step = 8 if name == "export" else 1  # 67 calls, of a third of a second each
    for n in range(1, 200, step):
        calls = FailingCalls(tmp_path, n, numbers[n % len(numbers)])
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            calls.patch(patch)
            try:
                cli.run_command(function, args_type, argv)
                code = 0
            except SystemExit as end:
                code = end.code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((2, 1), (0, 0)), (n, code, errors)
        assert output.read_bytes() == earlier, n
        if calls.num_calls < n:
            break
    assert 2 < calls.num_calls < n and not list(tmp_path.rglob("*.partial"))
    cli.run_command(function, args_type, argv)
    assert output.read_bytes() == earlier

"""Any text for any option of any command is parsed or rejected in one line."""

import contextlib
import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories_slm.commands import _ARGS, COMMANDS, _load
from tinystories_slm.config import RunConfig, parse
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.errors import UserError

HOSTILE = (
    "", "null", "~", "# a", "[", "{a: 1}", "1e999", "nan", "9" * 5000, "0x1F", "1:30", "true", "a\nb", "\0",
    "\ud800", "*a", "&a", "!!timestamp x", "!!python/object:os.system x", "%", "- a", "? a", "---", "\u2028",
    "<<: 1", "~nobody/x", "x" * 5000, "/" * 300, "-", "--", "=", "--config", "2026-99-99",
)  # fmt: skip
"""Texts that YAML, jsonargparse or the file system read in their own way."""
_CLASSES = sorted({command.args for command in COMMANDS.values()} - {f"{_ARGS}.doctor:doctor_args"})


@cache
def _options(args: str) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parse(_load(args), ["--help"])
    words = printed.getvalue().split()
    names = {word.rstrip(",]") for word in words if word.startswith("--")}
    return sorted(names - {"--", "--help", "--print_config"})  # these two end the process


@settings(max_examples=300)
@given(data=st.data(), value=st.sampled_from(HOSTILE) | st.text(max_size=20))
def test_any_text_is_parsed_or_a_user_error(data, value):
    args = data.draw(st.sampled_from(_CLASSES))
    option = data.draw(st.sampled_from(_options(args)))
    argv = data.draw(st.sampled_from([[f"{option}={value}"], [option, value], [option]]))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            parsed = parse(_load(args), argv)
        except SystemExit as end:
            assert end.code in (0, None)  # --help
        except UserError:
            pass
        else:
            assert isinstance(parsed, _load(args))


@given(st.sampled_from(HOSTILE) | st.text(max_size=20))
def test_a_prompt_reaches_the_program_unchanged_or_is_rejected(text):
    with contextlib.suppress(UserError):
        assert parse(GenerateArgs, ["--model", "m", f"--prompt={text}"]).prompt == text


def test_texts_with_yaml_tags_are_prompts():
    for text in ("!!timestamp x", "2020-01-01", "#"):
        assert parse(GenerateArgs, ["--model", "m", f"--prompt={text}"]).prompt == text


@dataclass(frozen=True, kw_only=True)
class ListArgs:
    """Options that take several values."""

    texts: list[str] = field(default_factory=list)
    """A list."""
    numbers: list[int] = field(default_factory=list)
    """A list of integers."""
    either: list[str] | str = ""
    """A list or a text."""
    last: bool = False
    """A switch."""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--texts", "a", "b=c", "--last"], {"texts": ["a", "b=c"], "last": True}),
        (["--texts=a", "--last=true", "--texts", "null"], {"texts": ["a", "null"], "last": True}),
        (["--texts=[a,b]", "--texts", "[c"], {"texts": ["a", "b", "[c"]}),
        (["--texts=[]"], {"texts": []}),
        (["--numbers", "1", "20", "--numbers=[-3]"], {"numbers": [1, 20, -3]}),
        (["--either", "a", "[b]"], {"either": ["a", "[b]"]}),
        (["--either=a", "--either=b"], {"either": ["a", "b"]}),
    ],
)
def test_lists_may_be_written_together_or_repeated(flags, expected):
    assert parse(ListArgs, flags) == ListArgs(**expected)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--texts"], "expected one argument"),
        (["--numbers", "010"], r"numbers \(010\): must be a decimal integer"),
        (["--numbers", "1", "x"], "numbers is 'x', which is not of type int"),
        (["--numbers=[1,2.5]"], "numbers is .*2.5.* not of type int"),
        (["x", "--texts=a"], "unrecognized arguments: x|unknown option 'x'"),
    ],
)
def test_lists_without_fitting_values_are_rejected(flags, problem):
    with pytest.raises(UserError, match=problem):
        parse(ListArgs, flags)


def test_flags_are_written_as_the_command_line_reads_them():
    options = {"a": True, "b": None, "c": 0.1, "d": Path("x"), "e": [{"name": "y"}]}
    expected = ["--a=true", "--b=null", "--c=0.1", "--d=x", '--e=[{"name": "y"}]']
    assert to_flags(options) == expected


def test_a_list_on_the_command_line_replaces_that_of_a_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("texts: [a, b]\nnumbers: [1]\n")
    args = parse(ListArgs, ["--texts", "c", "--config", str(path)])
    assert args == ListArgs(texts=["c"], numbers=[1])


def test_null_characters_are_rejected(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text('output_dir: "runs/a\\0b"\n')
    with pytest.raises(UserError, match=r"output_dir \('runs/a\\x00b'\): must not contain a NUL character"):
        parse(RunConfig, ["--config", str(path)])

"""Any text for any option of any command is parsed or rejected in one line."""

import contextlib
import io
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories_slm.commands import _ARGS, COMMANDS, _load
from tinystories_slm.config import RunConfig, parse
from tinystories_slm.config.command_args import GenerateArgs
from tinystories_slm.errors import UserError

HOSTILE = (
    "", "null", "~", "# a", "[", "{a: 1}", "1e999", "nan", "9" * 5000, "0x1F", "1:30", "true", "a\nb", "\0",
    "\ud800", "*a", "&a", "!!timestamp x", "!!python/object:os.system x", "%", "- a", "? a", "---", "\u2028",
    "<<: 1", "~nobody/x", "x" * 5000, "/" * 300, "-", "--", "=", "--config", "2026-99-99",
)  # fmt: skip
"""Texts that YAML, jsonargparse or the file system read in their own way."""
_CLASSES = sorted({command.args for command in COMMANDS.values()} - {f"{_ARGS}:doctor_args"})


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


def test_null_characters_are_rejected(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text('output_dir: "runs/a\\0b"\n')
    with pytest.raises(UserError, match=r"output_dir \('runs/a\\x00b'\): must not contain a NUL character"):
        parse(RunConfig, ["--config", str(path)])

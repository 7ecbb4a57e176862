"""The default prompt, and prompts from a file or standard input."""

import json
import sys
from pathlib import Path
from typing import Any

from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import check_not_a_pipe

DEFAULT_PROMPT = "Once upon a time"
_EXAMPLE_LINE = json.dumps({"prompt": DEFAULT_PROMPT})


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file, one per line, or from a .jsonl or .json file.

    A JSON prompt is a string, or the "prompt" of an object. A .jsonl file has one per line. A .json file is
    one list, or has one per line. The path `-` is standard input, as text. Blank lines are skipped; in other
    lines each blank is part of the prompt.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or contains no prompt, or a JSON value has no prompt.
    """
    name = "standard input" if str(path) == "-" else str(path)
    check_not_a_pipe("prompts", path)
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts ({name}) cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompts ({name}) is not valid UTF-8 in line {line}; save it as UTF-8") from error
    suffix = path.suffix.lower()
    if suffix == ".json" and (values := _parse_json_list(text, name)) is not None:
        prompts = [
            _prompt_of(value, f"prompts ({name}), item {number},") for number, value in enumerate(values, 1)
        ]
    else:
        # splitlines() also splits at U+2028 and others.
        numbered = [
            (number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)
        ]
        numbered = [(number, line) for number, line in numbered if line.strip()]
        prompts = [line for _, line in numbered]
        if suffix in (".json", ".jsonl"):
            prompts = [_parse_line(line, f"prompts ({name}), line {number},") for number, line in numbered]
    if not prompts:
        raise UserError(f"prompts ({name}) contains no prompt; write one per line")
    return prompts


def _parse_json_list(text: str, name: str) -> list[Any] | None:
    """Return the values of a JSON file that is one list or one object; None for one object per line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            return None
        line = f", line {error.lineno}," if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"prompts ({name}){line} is not JSON ({_json_reason(error)}); write [{_EXAMPLE_LINE}]"
        ) from error
    return value if isinstance(value, list) else [value]


def _parse_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or too many brackets
        raise UserError(f"{where} is not JSON ({_json_reason(error)}); write {_EXAMPLE_LINE}") from error
    return _prompt_of(value, where)


def _json_reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _prompt_of(value: Any, where: str) -> str:
    """Return the prompt of a JSON value: a string, or an object with the key "prompt"."""
    if isinstance(value, dict):
        if "prompt" not in value:
            raise UserError(f'{where} has no "prompt"; write {_EXAMPLE_LINE}')
        value = value["prompt"]
    elif not isinstance(value, str):
        raise UserError(f'{where} has no "prompt"; write {_EXAMPLE_LINE}')
    if not isinstance(value, str):
        raise UserError(f"{where} has a prompt that is not a string: {value!r}; write {_EXAMPLE_LINE}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON escapes allow an unpaired surrogate, UTF-8 does not
        raise UserError(
            f"{where} contains an unpaired surrogate (\\u{ord(value[error.start]):04x}); correct the prompt"
        ) from error
    return value

"""The default prompt, and prompts from a file or standard input."""

import json
import sys
from pathlib import Path

from tinystories_slm.errors import UserError

DEFAULT_PROMPT = "Once upon a time"
_EXAMPLE_LINE = json.dumps({"prompt": DEFAULT_PROMPT})


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file, one per line, or from a .jsonl file, the "prompt" of each line.

    The path `-` is standard input. Blank lines are skipped; in other lines each blank is part of the prompt.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or contains no prompt, or a JSON line has no prompt.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts ({name}) cannot be read: {error.strerror}") from error
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # splitlines() also splits at U+2028 and others
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompts ({name}) is not valid UTF-8 in line {line}; save it as UTF-8") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
    numbered = [(number, line) for number, line in numbered if line.strip()]
    if not numbered:
        raise UserError(f"prompts ({name}) contains no prompt; write one per line")
    if path.suffix == ".jsonl":
        return [_parse_json_prompt(line, f"prompts ({name}), line {number},") for number, line in numbered]
    return [line for _, line in numbered]


def _parse_json_prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write {_EXAMPLE_LINE}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f'{where} has no "prompt"; write {_EXAMPLE_LINE}') from error
    if not isinstance(prompt, str):
        raise UserError(f"{where} has a prompt that is not a string: {prompt!r}; write {_EXAMPLE_LINE}")
    return prompt

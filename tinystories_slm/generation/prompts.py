"""Prompts from a file or standard input."""

import json
import sys
from pathlib import Path

from tinystories_slm.errors import InputError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; of a .jsonl file, the "prompt" of each line.

    The path `-` is standard input. Empty lines are skipped; of the others every blank is part of the prompt.

    Raises:
        InputError: it cannot be read, is no UTF-8, holds no prompt, or a line of JSON has none.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"prompts ({name}) cannot be read: {error.strerror}") from error
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines(), which cuts at more than newlines
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"prompts ({name}) is not valid UTF-8 in line {line}; save it as UTF-8") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
    numbered = [(number, line) for number, line in numbered if line.strip()]
    if not numbered:
        raise InputError(f"prompts ({name}) holds no prompt; write one per line")
    if path.suffix == ".jsonl":
        return [_prompt_of(line, f"prompts ({name}), line {number},") for number, line in numbered]
    return [line for _, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise InputError(f'{where} has no "prompt"; write {{"prompt": "Once upon a time"}}') from error
    if not isinstance(prompt, str):
        raise InputError(f"{where} has a prompt that is no text: {prompt!r}")
    return prompt

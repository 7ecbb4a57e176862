"""The default prompt, prompts of blocks, and prompts from a file or standard input."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinystories_slm.data.chat_template import has_block_template
from tinystories_slm.data.instruct import FEATURES, InstructBlock, prompt_text
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import check_not_a_pipe

DEFAULT_PROMPT = "Once upon a time"
_EXAMPLE_LINE = json.dumps({"prompt": DEFAULT_PROMPT})
_BLOCK_PROMPT = prompt_text(InstructBlock())
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def default_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt without options: `Once upon a time`, or `Story:` for a model of blocks."""
    return _BLOCK_PROMPT if has_block_template(tokenizer) else DEFAULT_PROMPT


def block_prompt(options: Mapping[str, str]) -> str:
    """Return the prompt of a block of TinyStories-Instruct with the parts in `options`.

    Args:
        options: `words` and `features`, separated by commas, `summary` and `random_sentence`; any of them.

    Raises:
        UserError: a part is empty, a word is no word, or a feature is not one of the published blocks.
    """
    words, features = (_split_list(name, options) for name in ("words", "features"))
    for word in words:
        if _WORD.fullmatch(word) is None:
            raise UserError(f"words ({word}) must be letters, with - or ' between them; correct the word")
    for feature in features:
        if feature not in FEATURES:
            raise UserError(f"features ({feature}) must be among {', '.join(FEATURES)}; use one of them")
    summary, sentence = (_read_line(name, options) for name in ("summary", "random_sentence"))
    block = InstructBlock(words=words, features=features, summary=summary, random_sentence=sentence)
    return prompt_text(block)


def _split_list(name: str, options: Mapping[str, str]) -> tuple[str, ...]:
    if name not in options:
        return ()
    items = [item.strip() for item in options[name].split(",")]
    if not all(items):
        example = "ball, sad" if name == "words" else "Dialogue, Twist"
        raise UserError(f'{name} ({options[name]}) must have text around each comma; use "{example}"')
    return tuple(items)


def _read_line(name: str, options: Mapping[str, str]) -> str | None:
    """Return the text of an option on one line."""
    if name not in options:
        return None
    if not options[name].strip():
        raise UserError(f"{name} ({options[name]!r}) must not be empty; write a sentence or omit it")
    if any("\ud800" <= char <= "\udfff" for char in options[name]):
        raise UserError(f"{name} is not valid UTF-8; set the terminal to UTF-8")
    return " ".join(options[name].split())


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

"""Option names and values of earlier versions, in flags, YAML files and saved configurations."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from tinystories_slm.errors import UserError
from tinystories_slm.resources import resource_path

logger = logging.getLogger(__name__)

# Earlier name -> name, and earlier value -> value where values changed too.
RENAMED_OPTIONS: dict[str, tuple[str, Mapping[str, str]]] = {
    "data.windows": ("data.packing", {"stream": "contiguous", "story": "document"}),
    "data.validation": ("data.validation_split", {"cut": "holdout"}),
    "model.family": ("model.family", {"gpt": "gpt2", "modern": "llama"}),
    "train.embedding_lr_rate": ("train.embedding_lr_multiplier", {}),
    "train.kernels": ("train.cpu_kernels", {}),
    "train.max_skipped_in_a_row": ("train.max_consecutive_skipped_steps", {}),
    "train.momentum": ("train.muon_momentum", {}),
    "train.ns_steps": ("train.muon_ns_steps", {}),
    "decoding": ("backend", {"plain": "hf", "native": "cpu"}),
}


def rename_flags(argv: Sequence[str], renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> list[str]:
    """Return `argv` with earlier option names and values replaced; one line is logged for each."""
    current: list[str] = []
    expects_value_of: str | None = None
    for arg in argv:
        if expects_value_of is not None:
            current.append(_rename_value(expects_value_of, arg, renamed))
            expects_value_of = None
            continue
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in renamed:
            current.append(arg)
            continue
        new, _ = renamed[name]
        if equals:
            current.append(f"--{new}={_rename_value(name, value, renamed)}")
        else:
            current.append(f"--{new}")
            expects_value_of = name
    return current


def rename_in_yaml(text: str, renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """Return YAML `text` with earlier option names and values replaced in place; comments and layout stay.

    Text that is not YAML, or not a mapping, is returned as it is: the parser reports it.
    """
    root = _compose(text)
    edits: list[tuple[int, int, str]] = []
    _collect_edits(root, "", renamed, edits)
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def read_config_file(path: Path, renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """Return the path to parse, or the text of the file with current names where it has earlier ones.

    `configs/9m.yaml` is found among the presets of the package where the current folder has none.
    """
    path = path.expanduser()
    if not path.exists() and path.parts[:1] == ("configs",):
        with suppress(UserError):
            path = resource_path(path.as_posix())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return str(path)  # the parser reports it
    _check_nodes(_compose(text), "", path)
    current = rename_in_yaml(text, renamed)
    return str(path) if current == text else current


def _compose(text: str) -> yaml.Node | None:
    """Return the syntax tree of YAML `text`; None if it is not YAML, which the parser reports."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None


def _check_nodes(node: yaml.Node | None, prefix: str, path: Path) -> None:
    """Reject what YAML 1.1 accepts and reads otherwise than it looks.

    Raises:
        UserError: a key that occurs twice, of which the first would be dropped, or an integer such as 0200
            (octal) or 1:30 (base 60).
    """
    if isinstance(node, yaml.ScalarNode):
        is_plain_integer = node.tag == "tag:yaml.org,2002:int" and node.style is None
        if is_plain_integer and not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
            raise UserError(
                f"{path}, line {node.start_mark.line + 1}: {prefix.rstrip('.')} ({node.value}) must be a "
                "decimal integer; write it as in 1500, or quote it if it is text"
            )
        return
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise UserError(
                f"{path}, line {key.start_mark.line + 1}: {prefix}{key.value} occurs twice; remove one"
            )
        seen.add(key.value)
        _check_nodes(value, f"{prefix}{key.value}.", path)


def _collect_edits(
    node: yaml.Node | None,
    prefix: str,
    renamed: Mapping[str, tuple[str, Mapping[str, str]]],
    edits: list[tuple[int, int, str]],
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in renamed and isinstance(value, yaml.ScalarNode):
            new, _ = renamed[name]
            if (tail := new.rpartition(".")[2]) != key.value:
                edits.append((key.start_mark.index, key.end_mark.index, tail))
            if (new_value := _rename_value(name, value.value, renamed)) != value.value:
                edits.append((value.start_mark.index, value.end_mark.index, new_value))
        _collect_edits(value, f"{name}.", renamed, edits)


def _rename_value(name: str, value: str, renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """Return the current value of option `name`, and log one line if its name or value has changed."""
    new_name, values = renamed[name]
    new_value = values.get(value, value)
    if new_value != value:
        logger.info("%s=%s is now %s=%s", name, value, new_name, new_value)
    elif new_name != name:
        logger.info("option %s is now called %s", name, new_name)
    return new_value

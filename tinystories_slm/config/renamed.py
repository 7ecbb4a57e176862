"""Option names and values of earlier versions, in flags, YAML files and saved configurations."""

import logging
from collections.abc import Mapping, Sequence

import yaml

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
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    edits: list[tuple[int, int, str]] = []
    _collect_edits(root, "", renamed, edits)
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


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

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

# Earlier options whose values, joined with commas, are the value of one option: earlier name -> name, and
# template of the value or earlier value -> value.
JOINED_OPTIONS: dict[str, tuple[str, str | Mapping[str, str]]] = {
    "train.keep_checkpoints": ("train.keep", "newest:{}"),
    "train.retention": ("train.keep", {"newest": "", "all": "all:full", "powers_of_two": "log:full"}),
}


def rename_flags(argv: Sequence[str], renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> list[str]:
    """Return `argv` with earlier option names and values replaced; one line is logged for each."""
    argv = _join_flags(argv)
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
    _collect_joins(root, "", edits)
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


def _join_flags(argv: Sequence[str]) -> list[str]:
    """Replace the flags of `JOINED_OPTIONS` by one flag for each new option, before the other flags."""
    rest: list[str] = []
    found: dict[str, str] = {}
    values = iter(argv)
    for arg in values:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and name in JOINED_OPTIONS and (equals or (value := next(values, None))):
            found[name] = value
        else:
            rest.append(arg)
    return [f"--{name}={value}" for name, value in _join_values(found).items()] + rest


def _collect_joins(node: yaml.Node | None, prefix: str, edits: list[tuple[int, int, str]]) -> None:
    """Replace each of the `JOINED_OPTIONS` in a mapping by the new option with the joined value.

    The same line may then occur twice, which YAML allows.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    pairs = [(f"{prefix}{key.value}", key, value) for key, value in node.value]
    earlier = [pair for pair in pairs if pair[0] in JOINED_OPTIONS and isinstance(pair[2], yaml.ScalarNode)]
    joined = _join_values({name: value.value for name, _, value in earlier})
    for name, key, value in earlier:
        new = JOINED_OPTIONS[name][0]
        edits.append((key.start_mark.index, key.end_mark.index, new.rpartition(".")[2]))
        edits.append((value.start_mark.index, value.end_mark.index, f'"{joined[new]}"'))
    for name, _, value in pairs:
        _collect_joins(value, f"{name}.", edits)


def _join_values(found: Mapping[str, str]) -> dict[str, str]:
    """Return the new options for the values of earlier ones, and log one line for each new option."""
    parts: dict[str, list[str]] = {}
    for name, (new, values) in JOINED_OPTIONS.items():
        if name in found:
            value = found[name]
            value = values.format(value) if isinstance(values, str) else values.get(value, value)
            parts.setdefault(new, []).append(value)
    joined = {new: ",".join(filter(None, values)) for new, values in parts.items()}
    for new, value in joined.items():
        earlier = ", ".join(f"{name}={found[name]}" for name in JOINED_OPTIONS if name in found)
        logger.info("%s is now %s=%s", earlier, new, value or "(its default)")
    return joined


def _rename_value(name: str, value: str, renamed: Mapping[str, tuple[str, Mapping[str, str]]]) -> str:
    """Return the current value of option `name`, and log one line if its name or value has changed."""
    new_name, values = renamed[name]
    new_value = values.get(value, value)
    if new_value != value:
        logger.info("%s=%s is now %s=%s", name, value, new_name, new_value)
    elif new_name != name:
        logger.info("option %s is now called %s", name, new_name)
    return new_value

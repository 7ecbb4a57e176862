"""Parse YAML files and flags into a typed dataclass, with one-line errors."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TypeVar, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from tinystories_slm.config.config_file import is_misread_number, read_config_file
from tinystories_slm.config.renamed import RENAMED_OPTIONS, rename_flags
from tinystories_slm.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Args = TypeVar("Args")


def parse(args_type: type[Args], argv: Sequence[str] | None = None) -> Args:
    """Return an `args_type` from its defaults, then each `--config` file left to right, then flags.

    `--help` prints and exits. So does `--print_config`, once the values are accepted.

    Raises:
        UserError: an unknown key, a wrong type, an unreadable file, or a value that the
            dataclass rejects.
    """
    given = rename_flags(sys.argv[1:] if argv is None else argv, RENAMED_OPTIONS)
    if any(arg.partition("=")[0] == "--print_config" for arg in given):
        parse(args_type, [arg for arg in given if arg.partition("=")[0] != "--print_config"])
    parser = _build_parser(args_type, Path(sys.argv[0]).name)
    try:
        given, texts = _set_null_texts_aside(_join_lists(given, args_type), args_type)
        given = _config_files_first(_expand_switches(given, args_type), args_type)
        namespace = parser.parse_args(given)
        _reject_null_sections(namespace, args_type)
        values = vars(parser.instantiate(namespace))
        for name, text in texts.items():
            section, _, field_name = name.rpartition(".")
            if section:
                values[section] = replace(values[section], **{field_name: text})
            else:
                values[field_name] = text
    except UserError:
        raise
    except _PARSER_ERRORS as error:  # a file that is not YAML, a null that is not allowed
        raise UserError(_format_error(str(error), args_type)) from error
    args = args_type(**{field.name: values.get(field.name, field.default) for field in fields(args_type)})
    _reject_null_characters(args)
    return args


def given_options(args_type: type, argv: Sequence[str]) -> set[str]:
    """Return the names of the options that `argv` sets: by flags, and in the files of `--config`."""
    names: set[str] = set()
    numbers, paths = _option_names(args_type, of=_NUMBERS), _option_names(args_type, of=_PATHS)
    rest = iter(rename_flags(argv, RENAMED_OPTIONS))
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name == "--config":
            text = read_config_file(Path(value if equals else next(rest)), numbers=numbers, paths=paths)
            content = Path(text).read_text(encoding="utf-8") if "\n" not in text else text
            names |= _leaf_names(yaml.safe_load(content))
        elif name.startswith("--"):
            names.add(name.removeprefix("--"))
    return names


def _leaf_names(values: object, prefix: str = "") -> set[str]:
    """Return the dotted names of the values in nested mappings."""
    if not isinstance(values, dict):
        return {prefix.rstrip(".")}
    return {name for key, value in values.items() for name in _leaf_names(value, f"{prefix}{key}.")}


@cache
def _build_parser(args_type: type, program: str) -> ArgumentParser:
    """Return the parser of a class, built once: reading the docstrings of the options takes 60 ms."""
    parser = ArgumentParser(
        prog=program, description=args_type.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the options below; repeatable, the last one wins"
    )
    parser.add_class_arguments(args_type, None)
    # Without a default, `--print_config` leaves them out: its output is a file for every command of a run.
    for action in parser._actions:
        if action.dest in _command_options(args_type):
            action.default = SUPPRESS
    return parser


def _command_options(args_type: type) -> set[str]:
    """Return the options that a command adds to the configuration of a run and that are null by default."""
    inherited = {
        field.name for base in args_type.__mro__[1:] if _has_sections(base) for field in fields(base)
    }
    own = {field.name for field in fields(args_type) if field.default is None}
    return own - inherited if inherited else set()


def _has_sections(args_type: type) -> bool:
    return is_dataclass(args_type) and any(is_dataclass(field.type) for field in fields(args_type))


def _config_files_first(argv: Sequence[str], args_type: type) -> list[str]:
    """Move each `--config FILE` to the front: a flag overrides a file wherever it stands.

    A file that has earlier option names is replaced by its text with the current ones.
    """
    numbers = _option_names(args_type, of=_NUMBERS)
    paths = _option_names(args_type, of=_PATHS)
    files: list[str] = []
    flags: list[str] = []
    rest = iter(argv)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name != "--config":
            flags.append(arg)
        elif equals or (value := next(rest, None)) is not None:
            files.append(f"--config={read_config_file(Path(value), numbers=numbers, paths=paths)}")
        else:
            files.append(arg)
    return files + flags


# PyYAML raises AttributeError and others for tags such as `!!timestamp x`.
_PARSER_ERRORS = (
    ArgumentError, AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError,
    yaml.YAMLError,
)  # fmt: skip
_LISTS = (list[str], list[str] | str, list[int])
_NUMBERS = (int, int | None, float, float | None)
_PATHS = (Path, Path | None)
_PLACEHOLDER = "text that YAML reads as null"


def _join_lists(argv: Sequence[str], args_type: type) -> list[str]:
    """Replace the values of each list (`--model A B`, or `--model A --model B`) by one JSON list.

    A value in brackets (`--baseline=[A,B]`) is a list, except where the option may be one text.
    """
    kinds = {f"--{name}": kind for kind in _LISTS for name in _option_names(args_type, of=(kind,))}
    given: dict[str, list[str]] = {}
    kept: list[str] = []
    option = ""  # of which the next argument is a value
    for arg in argv:
        name, equals, value = arg.partition("=") if arg.startswith("--") else (option, "=", arg)
        if name not in kinds:
            kept.append(arg)
        elif equals:
            given.setdefault(name, []).append(value)
        else:
            given.setdefault(name, [])
        if arg.startswith("--"):
            option = name if name in kinds and not equals else ""
    for name, values in given.items():
        items = [item for value in values for item in _list_items(name, value, kinds[name])]
        kept.append(f"{name}={json.dumps(items, ensure_ascii=False)}" if values else name)
    return kept


def _list_items(name: str, text: str, kind: object) -> list[object]:
    """Return the items that one value on the command line adds to a list of this type."""
    if kind != list[str] | str and text.startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    if kind == list[int]:
        _check_number(name, text)
    return [int(text) if kind == list[int] and re.fullmatch(r"-?[0-9]+", text) else text]


def _check_number(name: str, text: str) -> None:
    """Check that YAML 1.1 reads `text` as a person does.

    Raises:
        UserError: it is octal or in base 60 (`010`, `1:30`).
    """
    if is_misread_number(text):
        raise UserError(
            f"{name.removeprefix('--')} ({text}): must be a decimal integer or fraction; write it as in 1500"
        )


def _set_null_texts_aside(argv: Sequence[str], args_type: type) -> tuple[list[str], dict[str, str | Path]]:
    """Replace texts that jsonargparse would read as null, and return them by option.

    It reads an optional string or path as YAML, where `# one`, `~`, `&amp` and `null` are null. `null` stays
    null for paths, and for the options of a run's sections, where it overrides a file.

    Raises:
        UserError: a number that YAML 1.1 would read as octal or in base 60 (`010`, `1:30`), or an empty path.
    """
    optional_paths = {f"--{name}" for name in _option_names(args_type, of=(Path | None,))}
    strings = {f"--{name}" for name in _option_names(args_type, of=(str | None,))} | optional_paths
    paths = {f"--{name}" for name in _option_names(args_type, of=_PATHS)}
    numbers = {f"--{name}" for name in _option_names(args_type, of=_NUMBERS)}
    kept: list[str] = []
    texts: dict[str, str | Path] = {}
    option = ""
    for arg in argv:
        name, equals, value = (option, "", arg) if option else arg.partition("=")
        if not option and name in strings | paths | numbers and not equals:
            option = name
            kept.append(arg)
            continue
        if name in numbers and (equals or option):
            _check_number(name, value)
        if name in paths and (equals or option) and not value:
            raise UserError(f"{name.removeprefix('--')} (.): must name a folder or file; write its path")
        if name in strings and (equals or option):
            texts.pop(name.removeprefix("--"), None)  # the last one counts
            is_path = name in optional_paths
            if _is_null_in_yaml(value) and not (value == "null" and (is_path or "." in name)):
                texts[name.removeprefix("--")] = Path(value) if is_path else value
                arg = f"{name}={_PLACEHOLDER}" if equals else _PLACEHOLDER
        kept.append(arg)
        option = ""
    return kept, texts


def _is_null_in_yaml(text: str) -> bool:
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False
    except Exception:  # `!!timestamp x`: PyYAML fails, and jsonargparse would, too
        return True


def _expand_switches(argv: Sequence[str], args_type: type) -> list[str]:
    """Write a switch without a value (`--stream`) as jsonargparse needs it: `--stream=true`."""
    switches = {f"--{name}" for name in _option_names(args_type, of=(bool,))}
    followers = [*argv, "--"][1:]
    return [
        f"{arg}=true" if arg in switches and follower.startswith("--") else arg
        for arg, follower in zip(argv, followers, strict=True)
    ]


def _format_error(message: str, args_type: type) -> str:
    """Return the message of jsonargparse as one line that also names the fix."""
    key = re.search(r'Parser key "([\w.]+)":', message)
    given = re.search(r"(?:Got value|Given value): (.*)$", message)
    expected = re.findall(r"Expected an? ([^\n]*?)(?:\. Got value.*)?$", message, flags=re.MULTILINE)
    if key and given and expected:
        kinds = " or ".join(dict.fromkeys(_format_type(kind) for kind in expected))
        kinds = kinds if kinds.startswith("one of") else f"of type {kinds}"
        return f"{key[1]} is {given[1]!r}, which is not {kinds}; correct the value (--help describes it)."

    unknown = (
        re.search(r"unrecognized arguments: -*([\w.]+)", message)
        or re.search(r"Option '([\w.]+)' is not accepted", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>\w+)'", message)
    )
    if unknown:
        name = ".".join(part for part in unknown.groups() if part)
        return f"unknown option {name!r}{_suggestion(name, _option_names(args_type))}"
    line = " ".join(message.split())
    return f"{line.rstrip('.')}; --help lists every option with its type."


def _format_type(kind: str) -> str:
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("NoneType", "null")
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {choices[1]}"
    return kind


def _reject_null_sections(namespace: Namespace, args_type: type, prefix: str = "") -> None:
    """Reject a value for a whole section, and null for an option that needs a value."""
    for field in fields(args_type):
        if field.name not in namespace:
            continue
        name, value = prefix + field.name, namespace[field.name]
        if is_dataclass(field.type):
            if not isinstance(value, Namespace):
                raise UserError(f"{name} is {value!r}, which is not a section; indent its options below it.")
            _reject_null_sections(value, field.type, f"{name}.")
        elif value is None and NoneType not in get_args(field.type):
            raise UserError(f"{name} must not be null; remove it or set a value.")


def _reject_null_characters(args: object, prefix: str = "") -> None:
    """Reject text with a NUL, which YAML can hold and no path, name or system call can."""
    for field in fields(args):
        name, value = prefix + field.name, getattr(args, field.name)
        if is_dataclass(value):
            _reject_null_characters(value, f"{name}.")
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and "\0" in str(text):
                raise UserError(f"{name} ({str(text)!r}): must not contain a NUL character; remove it")


def _option_names(args_type: type, prefix: str = "", of: Sequence[object] = ()) -> list[str]:
    """Return every option in dotted form; with `of`, only those of one of these types."""
    names = []
    for field in fields(args_type):
        if isinstance(field.type, type) and is_dataclass(field.type):
            names += _option_names(field.type, f"{prefix}{field.name}.", of)
        elif not of or field.type in of:
            names.append(prefix + field.name)
    return names


def _suggestion(name: str, known: list[str]) -> str:
    section, _, tail = name.rpartition(".")
    # A name whose last part is known elsewhere (`lr` for `train.lr`) is the most likely slip.
    near = [option for option in known if option.split(".")[-1] == tail]
    near = near or get_close_matches(name, known, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    siblings = [option for option in known if option.rpartition(".")[0] == section]
    return f"; {section or 'this command'} has {', '.join(siblings)}." if siblings else "; --help lists all."

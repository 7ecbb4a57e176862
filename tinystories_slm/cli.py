"""What every script shares: YAML files and flags into a typed dataclass, and errors in one line."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from tqdm import tqdm

from tinystories_slm.errors import InputError, Stopped

# Python puts a script's own folder first on the import path, where scripts/evaluate.py would hide the
# library of that name from everybody. Nothing in that folder is meant to be imported.
if sys.path and (Path(sys.path[0]) / "evaluate.py").is_file():
    del sys.path[0]

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Args = TypeVar("Args")


def parse(args_type: type[Args], argv: Sequence[str] | None = None) -> Args:
    """An `args_type` from its defaults, then each `--config` file left to right, then flags.

    `--help` and `--print_config` print and exit.

    Raises:
        InputError: an unknown key, a wrong type, an unreadable file, or a value that the
            dataclass itself refuses.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(description=args_type.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of the options below; repeatable, the last one wins"
    )
    parser.add_class_arguments(args_type, None)
    try:
        namespace = parser.parse_args(_files_first(_bare_flags(given, args_type)))
        _check_filled(namespace, args_type)
        values = vars(parser.instantiate(namespace))
    except (
        ArgumentError,
        TypeError,
        ValueError,
    ) as error:  # a file of other than YAML, a null where none may be
        raise InputError(_one_line(str(error), args_type)) from error
    return args_type(**{field.name: values[field.name] for field in fields(args_type)})


def doorway(main: Callable[[Args], Any], args_type: type[Args]) -> None:
    """Parse the command line, run `main`, and say how it ended in one line and an exit code.

    0: done; 2: an `InputError`; 75: `Stopped` in order, the same command goes on; 130: interrupted.
    """
    try:
        with _shown_log():
            main(parse(args_type))
        sys.stdout.flush()  # so that a closed pipe shows here
    except InputError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except Stopped as stop:
        _say(str(stop))
        sys.exit(75)
    except KeyboardInterrupt:
        _to_standard_error("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # `| head`: whoever read has read enough
        # Python flushes standard output once more as it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as shells report it, like 130 above


def _say(line: str) -> None:
    """Every process of a distributed launch ends the same way; one line is enough."""
    if int(os.environ.get("RANK", 0)) == 0:
        _to_standard_error(line)


def _to_standard_error(line: str) -> None:
    """A `| tee` that the same Ctrl-C ended, a log on a full disk: nobody reads, and the work goes on."""
    try:
        tqdm.write(line, file=sys.stderr)
    except BrokenPipeError:
        # Python flushes once more as it exits, and would make another exit code of its failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except OSError:
        pass


@contextmanager
def _shown_log() -> Iterator[None]:
    """What the package reports, on standard error, bare, between the lines of any progress bar.

    Only the first process of a distributed launch reports; all of them warn.
    """
    handler = _AroundProgressBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("tinystories_slm")
    log.addHandler(handler)
    log.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _AroundProgressBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _to_standard_error(self.format(record))


def _files_first(argv: Sequence[str]) -> list[str]:
    """Move each `--config FILE` to the front: a flag beats a file wherever it stands."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(argv)
    for arg in rest:
        if arg == "--config":
            files += [arg, *([value] if (value := next(rest, None)) is not None else [])]
        elif arg.startswith("--config="):
            files.append(arg)
        else:
            flags.append(arg)
    return files + flags


def _bare_flags(argv: Sequence[str], args_type: type) -> list[str]:
    """A switch with no value behind it, `--stream`, as jsonargparse wants it: `--stream=true`."""
    switches = {f"--{name}" for name in _option_names(args_type, of=bool)}
    followers = [*argv, "--"][1:]
    return [
        f"{arg}=true" if arg in switches and follower.startswith("--") else arg
        for arg, follower in zip(argv, followers, strict=True)
    ]


def _one_line(message: str, args_type: type) -> str:
    """jsonargparse's complaint as one line that also names the way out."""
    key = re.search(r'Parser key "([\w.]+)":', message)
    given = re.search(r"(?:Got value|Given value): (.*)$", message)
    expected = re.findall(r"Expected an? ([^\n]*?)(?:\. Got value.*)?$", message, flags=re.MULTILINE)
    if key and given and expected:
        kinds = " or ".join(dict.fromkeys(_plain_type(kind) for kind in expected))
        return (
            f"{key[1]} is {given[1]!r}, which is no {kinds}; correct the value (--help says what it means)."
        )

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


def _plain_type(kind: str) -> str:
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("NoneType", "null")
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {choices[1]}"
    return kind


def _check_filled(namespace: Namespace, args_type: type, prefix: str = "") -> None:
    """Refuse what jsonargparse lets pass: a value for a whole section, and null where none may be."""
    for field in fields(args_type):
        name, value = prefix + field.name, namespace[field.name]
        if is_dataclass(field.type):
            if not isinstance(value, Namespace):
                raise InputError(
                    f"{name} is {value!r}, which is no section of options; indent them below it."
                )
            _check_filled(value, field.type, f"{name}.")
        elif value is None and NoneType not in get_args(field.type):
            raise InputError(f"{name} is null, and there is no doing without; leave it out or give a value.")


def _option_names(args_type: type, prefix: str = "", of: type | None = None) -> list[str]:
    """Every option, in dotted form; with `of` those of that type alone."""
    names = []
    for field in fields(args_type):
        if isinstance(field.type, type) and is_dataclass(field.type):
            names += _option_names(field.type, f"{prefix}{field.name}.", of)
        elif of in (None, field.type):
            names.append(prefix + field.name)
    return names


def _suggestion(name: str, known: list[str]) -> str:
    section, _, tail = name.rpartition(".")
    # A name whose last part is known elsewhere (`lr` for `train.lr`) is the likeliest slip.
    near = [option for option in known if option.split(".")[-1] == tail]
    near = near or get_close_matches(name, known, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    siblings = [option for option in known if option.rpartition(".")[0] == section]
    return f"; {section or 'there'} has {', '.join(siblings)}." if siblings else "; --help lists all."

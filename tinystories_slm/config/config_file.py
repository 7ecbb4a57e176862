"""Read a `--config` file: find it, reject what YAML 1.1 would misread, replace earlier option names."""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from tinystories_slm.config.renamed import RENAMED_OPTIONS, rename_in_yaml
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import check_not_a_pipe, expand_user
from tinystories_slm.resources import resource_path

_NULL = "tag:yaml.org,2002:null"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# Integers that start with 0, in another base, with an underscore or in base 60, and such decimal numbers.
_MISREAD_NUMBER = re.compile(
    r"""[-+]?(0[0-9_]+ | 0[xX][0-9a-fA-F_]+ | 0b[01_]+ | [0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?
    | (?=[^_]*_)[0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?)""",
    re.VERBOSE,
)


def is_misread_number(text: str) -> bool:
    """Whether YAML 1.1 reads `text` as another number than a person: 0200 is 128, and 1:30 is 90."""
    return _MISREAD_NUMBER.fullmatch(text) is not None


def read_config_file(path: Path, *, numbers: Collection[str], paths: Collection[str]) -> str:
    """Return the path to parse, or the text of the file with current names where it has earlier ones.

    `configs/9m.yaml` is found among the presets of the package where the current folder has none.

    Args:
        path: YAML file.
        numbers: Names of the options whose value is a number.
        paths: Names of the options whose value is a path.

    Raises:
        UserError: the file is empty, or YAML reads it otherwise than it looks.
    """
    path = expand_user(path)
    if not path.exists() and path.parts[:1] == ("configs",):
        with suppress(UserError):
            path = resource_path(path.as_posix())
    check_not_a_pipe("config", path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return str(path)  # the parser reports it
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_root(root, path)
        _NodeCheck(path, numbers, paths).check(root, "")
    except yaml.YAMLError:
        return str(path)  # the parser reports it
    except RecursionError as error:
        raise UserError(
            f"{path}: is nested too deeply, or an alias (*) refers to itself; correct it"
        ) from error
    current = rename_in_yaml(text, RENAMED_OPTIONS)
    return str(path) if current == text else current


def _check_root(root: yaml.Node | None, path: Path) -> None:
    """Check that the file has options with values.

    Raises:
        UserError: it is empty, a list or a text, or every value is missing.
    """
    if isinstance(root, yaml.MappingNode):
        if not root.value or any(value.tag != _NULL for _, value in root.value):
            return
        names = ", ".join(str(key.value) for key, _ in root.value)
        raise UserError(f"{path}: {names} must have a value; write options below it, or remove it")
    raise UserError(f"{path}: must hold options, as configs/9m.yaml does; write them, or remove --config")


@dataclass(frozen=True)
class _NodeCheck:
    """Rejects what YAML 1.1 accepts and reads otherwise than it looks."""

    path: Path
    numbers: Collection[str]
    paths: Collection[str]

    def check(self, node: yaml.Node, name: str) -> None:
        """Check the value of the option or section `name` and all values in it.

        Raises:
            UserError: a key that occurs twice, of which the first would be dropped, a number such as 0200
                (octal) or 1:30 (base 60), or an empty path.
        """
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.check(item, f"{name}[{index}]")
        else:
            self._check_mapping(node, name)

    def _check_mapping(self, node: yaml.Node, name: str) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, f"{name or 'a section'} must have names as keys; correct it")
            full_name = f"{name}.{key.value}".lstrip(".")
            if key.value in seen:
                raise self._error(key, f"{full_name} occurs twice; remove one")
            seen.add(key.value)
            self.check(value, full_name)

    def _check_scalar(self, node: yaml.ScalarNode, name: str) -> None:
        is_plain_number = node.style is None and node.tag in _NUMBERS
        if (is_plain_number or name in self.numbers) and is_misread_number(node.value):
            raise self._error(
                node,
                f"{name} ({node.value}) must be a decimal integer or fraction; write it as in 1500, or quote "
                "it if it is text",
            )
        if name in self.paths and node.value == "" and node.style is not None:
            raise self._error(node, f"{name} (.): must name a folder or file; write its path")

    def _error(self, node: yaml.Node, problem: str) -> UserError:
        return UserError(f"{self.path}, line {node.start_mark.line + 1}: {problem}")

"""Read a `--config` file: find it, reject what YAML 1.1 would misread, replace earlier option names."""

import re
from contextlib import suppress
from pathlib import Path

import yaml

from tinystories_slm.config.renamed import RENAMED_OPTIONS, compose_yaml, rename_in_yaml
from tinystories_slm.errors import UserError
from tinystories_slm.resources import resource_path


def read_config_file(path: Path) -> str:
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
    _check_nodes(compose_yaml(text), "", path)
    current = rename_in_yaml(text, RENAMED_OPTIONS)
    return str(path) if current == text else current


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

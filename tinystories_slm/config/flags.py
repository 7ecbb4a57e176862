"""Options written as flags of a command line."""

import json
from collections.abc import Mapping


def format_value(value: object) -> str:
    """Write an option's value as the command line reads it: `true`, `null`, 0.1, text, or a list as JSON."""
    return json.dumps(value) if isinstance(value, bool | list | None) else str(value)


def to_flags(options: Mapping[str, object]) -> list[str]:
    """Return `--NAME=VALUE` for each option."""
    return [f"--{name}={format_value(value)}" for name, value in options.items()]

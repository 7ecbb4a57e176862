"""Mixtures of sources: the value of `data.source` that lists several, and its canonical text."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One source of a mixture, with its options; null for those of the section `data`."""

    name: str
    """Value as of `data.source`."""
    weight: int | float = 1
    """Share of the training stories, relative to the other parts."""
    subset: str | None = None
    revision: str | None = None
    text_column: str | None = None

    @property
    def exact_weight(self) -> Fraction:
        """Weight as it was written: 0.1 is a tenth."""
        return Fraction(str(self.weight))


def parse_mixture(value: str) -> list[MixturePart] | None:
    """Return the parts that the text `value` lists, as YAML or JSON; None if it is no list of mappings.

    Raises:
        ValueError: a part has no name, an unknown option or a weight that is not a positive number.
    """
    if not value.lstrip().startswith("["):
        return None  # without a parser: most values are names and paths
    try:
        listed = yaml.safe_load(value)
    except yaml.YAMLError:
        return None
    if not isinstance(listed, list) or not listed or not all(isinstance(part, dict) for part in listed):
        return None
    return [_parse_part(part) for part in listed]


def format_mixture(parts: Sequence[MixturePart]) -> str:
    """Return the canonical text: JSON with each weight, and without options that are null."""
    values = [{key: value for key, value in asdict(part).items() if value is not None} for part in parts]
    return json.dumps(values, ensure_ascii=False)


def canonical_source(value: str | list[dict[str, Any]]) -> str:
    """Return `value` of `data.source` as text: a list as the canonical text of its mixture.

    Raises:
        ValueError: as `parse_mixture`.
    """
    if not isinstance(value, str):
        return format_mixture([_parse_part(part) for part in value])
    parts = parse_mixture(value)
    return value if parts is None else format_mixture(parts)


def _parse_part(values: dict[str, Any]) -> MixturePart:
    names = [field.name for field in fields(MixturePart)]
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{key} is not an option of a part; use {', '.join(names)}")
        if key != "weight" and not isinstance(value, str):
            raise ValueError(f"{key} ({value}) must be text; quote it")
    if not values.get("name"):
        raise ValueError("each part must have a name, as in {name: builtin, weight: 2}; add it")
    weight = values.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight ({weight}) of {values['name']} must be a number above 0; correct it")
    if isinstance(weight, float) and weight.is_integer():
        weight = int(weight)  # 3.0 and 3 are the same mixture
    return MixturePart(**values | {"weight": weight})

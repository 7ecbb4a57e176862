"""Canaries: the value of `data.canaries`, stated texts with stated counts, and its canonical text."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from typing import Any

import yaml

_SLOT = re.compile(r"\{([^{}]*)\}")
_MAX_COUNT = 1_000_000
_MAX_ALTERNATIVES = 2**62
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Canary:
    """A text with slots, of which one filling is planted; the other fillings are its alternatives."""

    template: str
    """Text with slots, `{digit}` or words such as `{red|green}`; without slots it has no alternative."""
    count: int
    """Number of copies in the training stories; 0 for a text that is only compared."""
    occurrence: int = 0
    """Number of earlier canaries with this template, which have other fillings."""

    @property
    def num_fillings(self) -> int:
        """Number of different texts."""
        product = 1
        for choices in self._slots:
            product *= len(choices)
        return product

    @property
    def index(self) -> int:
        """Number of the filling that is planted, drawn by hashes of the template.

        The fillings of one template are independent draws: neighbors would share digits, and a model that
        memorizes one of them would expose the others.
        """
        drawn: list[int] = []
        for draw in numbers():
            digest = hashlib.sha256(f"{draw} {self.template}".encode()).digest()
            index = int.from_bytes(digest[:8], "big") % self.num_fillings
            if index not in drawn:
                drawn.append(index)
            if len(drawn) > self.occurrence:
                break
        return drawn[-1]

    @property
    def text(self) -> str:
        """The text that is planted."""
        return self.fill(self.index)

    def fill(self, index: int) -> str:
        """Return the text of filling `index`, from 0 to `num_fillings` - 1."""
        values = []
        for choices in reversed(self._slots):
            index, choice = divmod(index, len(choices))
            values.append(choices[choice])
        fillings = iter(reversed(values))
        return _SLOT.sub(lambda _: next(fillings), self.template)

    @property
    def _slots(self) -> list[tuple[str, ...]]:
        return [_choices(match[1]) for match in _SLOT.finditer(self.template)]


def parse_canaries(value: str | Sequence[dict[str, Any]] | None) -> list[Canary]:
    """Return the canaries that `value` of `data.canaries` lists; a text is read as YAML or JSON.

    Raises:
        ValueError: it is no list of mappings, or a text, slot or count is not valid.
    """
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except Exception as error:  # PyYAML raises others than YAMLError for some tags
            raise ValueError(_EXPECTED) from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(_EXPECTED)
    found: list[Canary] = []
    for item in value:
        canary = _parse_one(item)
        earlier = sum(other.template == canary.template for other in found)
        if earlier >= canary.num_fillings:
            raise ValueError(f"{canary.template!r} has only {earlier} fillings; remove one, or add slots")
        found.append(Canary(canary.template, canary.count, earlier))
    return found


def format_canaries(canaries: Sequence[Canary]) -> str | None:
    """Return the canonical text, JSON; None for no canary."""
    if not canaries:
        return None
    values = [{"text": canary.template, "count": canary.count} for canary in canaries]
    return json.dumps(values, ensure_ascii=False)


_EXPECTED = "must be a list such as [{text: 'The code is {digit}{digit}{digit}.', count: 10}]; correct it"


def _parse_one(item: dict[Any, Any]) -> Canary:
    text, count = item.get("text"), item.get("count")
    if set(item) != {"text", "count"}:
        raise ValueError(_EXPECTED)
    if not isinstance(text, str) or not text.strip() or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"text ({text!r}) must be text; quote it")
    if type(count) is not int or not 0 <= count <= _MAX_COUNT:
        raise ValueError(f"count ({count}) of {text!r} must be between 0 and {_MAX_COUNT}; correct it")
    for match in islice(_SLOT.finditer(text), 1000):
        _choices(match[1])
    if "{" in _SLOT.sub("", text) or "}" in _SLOT.sub("", text):
        raise ValueError(f"text ({text!r}) has a brace without its partner; correct it")
    canary = Canary(text.strip(), count)
    if canary.num_fillings > _MAX_ALTERNATIVES:
        raise ValueError(f"text ({text[:60]!r}) must have fewer than 2^62 fillings; use fewer slots")
    return canary


def _choices(slot: str) -> tuple[str, ...]:
    """Return the values of a slot.

    Raises:
        ValueError: it is neither `digit` nor a list of different words.
    """
    if slot == "digit":
        return _DIGITS
    choices = tuple(slot.split("|"))
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise ValueError(
            f"slot ({{{slot}}}) must be {{digit}} or different words as in {{red|green}}; correct it"
        )
    return choices

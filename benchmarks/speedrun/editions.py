"""Editions of the speedrun: training text, validation text and target of each, fixed by hashes."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.builtin import BUILTIN
from tinystories_slm.errors import UserError
from tinystories_slm.grammar import generate_corpus

FOLDER = Path(__file__).parent / "editions"
_BUILTIN_SEEDS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class Text:
    """Stories of a split, and the SHA-256 of their file: JSON Lines with the key `text`."""

    num_stories: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Edition:
    """Everything that an entry cannot choose."""

    name: str
    source: str
    """`builtin`, or what the stories are, in words; then `--data` names a copy."""
    train: Text
    validation: Text
    target: float
    """Bits per byte that the mean over the seeds must be below, or so many above the entropy of the text."""
    above_entropy: bool
    """Whether the target counts from the entropy."""

    @property
    def is_builtin(self) -> bool:
        """Whether the grammar generates the text."""
        return self.source == BUILTIN

    def distance(self, scores: dict[str, float]) -> float:
        """Return what is compared with the target: bits per byte, without the entropy if it is known."""
        return scores["bits_per_byte"] - (scores["entropy_bits_per_byte"] if self.above_entropy else 0.0)

    def read_stories(self, split: str, data: str | None) -> list[str]:
        """Return the stories of `train` or `validation` from the source `data`.

        Raises:
            UserError: the source is missing, or its stories are others.
        """
        text: Text = getattr(self, split)
        stories = list(islice(self._open(split, data), text.num_stories))
        if (found := hashlib.sha256(json_lines(stories)).hexdigest()) != text.sha256:
            raise UserError(
                f"data ({data or self.source}): the first {text.num_stories:,} stories of {split} have the "
                f"SHA-256 {found[:12]}, and those of the edition {self.name} {text.sha256[:12]}; use its text"
            )
        return stories

    def _open(self, split: str, data: str | None) -> Iterator[str]:
        if self.is_builtin:
            return generate_corpus(getattr(self, split).num_stories, seed=_BUILTIN_SEEDS[split])
        if data is None:
            raise UserError(f"data (null): the edition {self.name} needs its stories; set --data PATH")
        splits = open_stories(data)
        if split not in splits:
            raise UserError(f"data ({data}): has no split {split}; use the text of the edition")
        return splits[split]()


def json_lines(stories: list[str]) -> bytes:
    """Return the file of stories whose hash an edition states."""
    return b"".join(json.dumps({"text": story}, ensure_ascii=False).encode() + b"\n" for story in stories)


def load_edition(name: str) -> Edition:
    """Return an edition by its name.

    Raises:
        UserError: there is no such edition.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise UserError(f"edition ({name}): must be one of {known}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    texts = {split: Text(**values.pop(split)) for split in ("train", "validation")}
    return Edition(name=name, **texts, **values)

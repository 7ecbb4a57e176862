"""Plant canaries (`data.canaries`) among the training stories, at places that their texts determine."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypedDict

from tinystories_slm.config.canaries import Canary
from tinystories_slm.errors import UserError


class PlantedCanary(TypedDict):
    """A canary in the manifest."""

    template: str
    text: str
    """The planted filling of the template."""
    count: int
    rows: list[int]
    """Rows of its copies in raw/train.parquet, from 0."""


def plant(
    stories: Iterable[str], num_stories: int, canaries: Sequence[Canary]
) -> tuple[Iterator[str], list[PlantedCanary]]:
    """Return the stories with the copies of `canaries` among them, and a record of each canary.

    A hash of the text and of the number of the copy selects the story before which a copy stands. The other
    stories stay in their order. The records are complete when the stories were read; reading them raises
    UserError if one contains a canary.
    """
    records = [
        PlantedCanary(template=one.template, text=one.text, count=one.count, rows=[]) for one in canaries
    ]
    return _insert(stories, deque(sorted(_places(canaries, num_stories))), records), records


def check_absent(stories: Iterable[str], split: str, canaries: Sequence[Canary]) -> Iterator[str]:
    """Yield `stories`, and raise UserError if one of `split` contains a canary."""
    texts = [canary.text for canary in canaries]
    for row, story in enumerate(stories):
        for text in texts:
            if text in story:
                raise UserError(f"data.canaries ({text}): occurs in {split} story {row}; use another text")
        yield story


def _places(canaries: Sequence[Canary], num_stories: int) -> Iterator[tuple[int, bytes, int]]:
    """Yield for each copy the story before which it stands, a key that orders copies, and its canary."""
    for index, canary in enumerate(canaries):
        for copy in range(canary.count):
            digest = hashlib.sha256(f"{copy} {canary.text}".encode()).digest()
            yield int.from_bytes(digest[:8], "big") * (num_stories + 1) // 2**64, digest, index


def _insert(
    stories: Iterable[str], places: deque[tuple[int, bytes, int]], records: Sequence[PlantedCanary]
) -> Iterator[str]:
    row = 0
    for number, story in enumerate(chain(stories, [None])):
        while places and (places[0][0] == number or story is None):
            record = records[places.popleft()[2]]
            record["rows"].append(row)
            yield record["text"]
            row += 1
        if story is not None:
            yield story
            row += 1

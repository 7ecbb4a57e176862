"""Sizes of the stories of a source, as far as a run may read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tinystories_slm.config import DataArgs
from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.registry import find_source

BUILTIN_BYTES_PER_STORY = 816
"""Mean of the built-in corpus: 32,635,744 bytes in 40,000 stories."""

# A machine that turns out faster than measured reads more.
_MARGIN = 1.3
# Fewer leave too few held-out ones.
_MIN_STORIES = 4000


@dataclass(frozen=True)
class StorySizes:
    """Sizes of the first training stories of a source."""

    cumulative_bytes: Sequence[int] | None
    """UTF-8 bytes of the first 1, 2, ... stories; None for the built-in corpus, which has no end."""
    is_all: bool
    """Whether the source has no more stories."""

    @property
    def num_bytes(self) -> float:
        """Bytes of all training stories; infinite if the run cannot read all of them."""
        return float(self.cumulative_bytes[-1]) if self.is_all and self.cumulative_bytes else float("inf")

    def num_stories(self, num_bytes: float) -> int | None:
        """Return `data.max_stories` for a run that reads `num_bytes`; None for all stories."""
        needed = _MARGIN * num_bytes
        if self.cumulative_bytes is None:
            return max(_MIN_STORIES, int(needed / BUILTIN_BYTES_PER_STORY))
        enough = sum(size < needed for size in self.cumulative_bytes) + 1
        number = max(_MIN_STORIES, enough)
        return None if self.is_all and number >= len(self.cumulative_bytes) else number


def read_sizes(data: DataArgs, max_bytes: float) -> StorySizes:
    """Read the training stories up to `max_bytes`, with a margin.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    if find_source(data.source, data.subset).is_builtin_corpus:
        return StorySizes(None, is_all=False)
    splits = open_stories(
        data.source, text_column=data.text_column, revision=data.revision, subset=data.subset
    )
    stories = splits["train"]() if "train" in splits else iter(())
    sizes: list[int] = []
    for total in accumulate(len(story.encode("utf-8")) for story in stories):
        sizes.append(total)
        if total >= _MARGIN * max_bytes and len(sizes) >= _MIN_STORIES:
            return StorySizes(sizes, is_all=False)
    return StorySizes(sizes, is_all=True)

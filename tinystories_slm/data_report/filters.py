"""Faults of stories: what the download removed, or what cleaning and deduplication would find."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from tinystories_slm.data.filters import dropped
from tinystories_slm.data.filters.cleaning import Cleaner, RuleCounts
from tinystories_slm.data.raw_stories import RawManifest

MAX_CLEANED = 20_000
"""Training stories that are checked if the download cleaned none: 2 s."""
MAX_COMPARED = 50_000
"""More training stories are not compared with each other if the download did not: 8 s."""


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Work of the cleaning rules."""

    is_applied: bool
    """Whether the download did it; otherwise the stories are as they were."""
    num_stories: int
    """Stories that were examined."""
    counts: dict[str, RuleCounts]


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Repeated stories of training."""

    is_dropped: bool
    """Whether the download dropped them; otherwise the stories are as they were."""
    num_exact: int
    num_near: int
    num_leaks: int
    """Training stories that repeat a validation story."""
    num_validation_leaked: int
    """Validation stories that they repeat."""


def find_faults(raw: RawManifest, sample: Iterable[str], num_stories: int) -> Cleaning:
    """Return the counts of the download, or those of the first stories of `sample` if it cleaned none."""
    if raw.cleaning_counts is not None:
        total = sum(counts["num_stories"] for counts in raw.splits.values())
        total += sum(count["num_dropped"] for count in raw.cleaning_counts.values())
        return Cleaning(is_applied=True, num_stories=total, counts=raw.cleaning_counts)
    cleaner = Cleaner()
    for story in islice(sample, MAX_CLEANED):
        cleaner.clean(story)
    return Cleaning(is_applied=False, num_stories=min(num_stories, MAX_CLEANED), counts=cleaner.counts)


def find_repeated(raw: RawManifest, read_split: Callable[[str], Iterator[str]]) -> Repeated | None:
    """Return the counts of the download, or compare the stories; None if they are too many for that."""
    if (found := raw.duplicates) is not None:
        return Repeated(
            is_dropped=True,
            num_exact=found["num_exact"],
            num_near=found["num_near"],
            num_leaks=found["num_leaks"],
            num_validation_leaked=found["num_validation_leaked"],
        )
    num_stories = raw.splits["train"]["num_stories"]
    if num_stories > MAX_COMPARED:
        return None
    found = dropped.find_repeated(lambda: read_split("train"), num_stories, read_split("validation"))
    return Repeated(is_dropped=False, **found.counts())

"""Stories that a download drops, in `raw/dropped.parquet`, and the choice of the repeated ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.filters import duplicates as near
from tinystories_slm.data.filters.duplicates import Duplicates, Leaks, find_duplicates
from tinystories_slm.data.progress import Arrays, SaveArrays, compute_arrays, iter_segments

_BATCH_STORIES = 4096
# Memory: each story has up to 64 pairs for each of its 8-grams.
_LEAK_BATCH_STORIES = 512
_SCHEMA = pa.schema({"text": pa.string(), "rule": pa.string(), "row": pa.int64()})


class DuplicateCounts(TypedDict):
    """Training stories that were dropped because they repeat another one, and the limits that decide."""

    num_exact: int
    """Stories with the words of an earlier training story."""
    num_near: int
    """Near duplicates of an earlier training story."""
    num_leaks: int
    """Stories that repeat a validation story."""
    num_validation_leaked: int
    """Validation stories that training stories repeated before; none is left."""
    duplicate_ngram: int
    duplicate_similarity: float
    leak_ngram: int
    leak_share: float
    library: str
    """Library of the MinHash values, with its version."""


class DroppedStories:
    """Context manager that writes the file: a text, the rule that dropped it, and the row that it repeats.

    `row` is a row of validation.parquet for the rule `leak`, one of train.parquet for `exact_duplicate` and
    `near_duplicate`, and null for the others. It is also null if that story was dropped itself.
    """

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._rows: list[tuple[str, str, int | None]] = []

    def add(self, text: str, rule: str, row: int | None = None) -> None:
        """Add a story; the rows are written in groups."""
        self._rows.append((text, rule, row))
        if len(self._rows) == _BATCH_STORIES:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._rows:
            self._write()
        self._writer.close()

    def _write(self) -> None:
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        self._writer.write_table(pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA))
        self._rows = []


def drop_repeated(
    read_training: Callable[[], Iterable[str]],
    num_stories: int,
    validation: Iterable[str],
    dropped: DroppedStories,
    save: SaveArrays = compute_arrays,
) -> tuple[np.ndarray, DuplicateCounts]:
    """Choose the training stories that stay: neither duplicates nor leaks.

    Args:
        read_training: Opens the training stories; they are read three times.
        num_stories: Number of training stories.
        validation: Validation stories; all of them stay.
        dropped: File for the others.
        save: Saves what was found in each segment, so that it is computed once.

    Returns:
        Which training stories stay, bool (num_stories,), and the counts.
    """
    found = find_repeated(read_training, num_stories, validation, save)
    is_leak, is_duplicate = found.is_leak, found.duplicates.is_duplicate
    first, is_exact = found.duplicates.first, found.duplicates.is_exact
    keep = ~(is_leak | is_duplicate)
    row = np.where(keep, np.cumsum(keep) - 1, -1)
    for index, story in enumerate(read_training()):
        if is_leak[index]:
            dropped.add(story, "leak", int(found.leak[index]))
        elif is_duplicate[index]:
            repeats = int(row[first[index]])
            rule = "exact_duplicate" if is_exact[index] else "near_duplicate"
            dropped.add(story, rule, None if repeats < 0 else repeats)
    return keep, DuplicateCounts(
        **found.counts(),
        duplicate_ngram=near.DUPLICATE_NGRAM,
        duplicate_similarity=near.DUPLICATE_SIMILARITY,
        leak_ngram=near.LEAK_NGRAM,
        leak_share=near.LEAK_SHARE,
        library=f"rensa {version('rensa')}",
    )


@dataclass(frozen=True)
class RepeatedStories:
    """Training stories that repeat validation stories, or earlier training stories."""

    leak: np.ndarray
    """Validation story that each one repeats, int64 (num_stories,); -1 for none."""
    leaked: np.ndarray
    """Validation stories that are repeated, int64."""
    duplicates: Duplicates

    @property
    def is_leak(self) -> np.ndarray:
        """Whether a story repeats a validation story, bool (num_stories,)."""
        return self.leak >= 0

    def counts(self) -> dict[str, int]:
        """Return the stories of each kind; a leak does not count as a duplicate."""
        is_duplicate, is_exact = self.duplicates.is_duplicate & ~self.is_leak, self.duplicates.is_exact
        return {
            "num_exact": int((is_exact & is_duplicate).sum()),
            "num_near": int((is_duplicate & ~is_exact).sum()),
            "num_leaks": int(self.is_leak.sum()),
            "num_validation_leaked": len(self.leaked),
        }


def find_repeated(
    read_training: Callable[[], Iterable[str]],
    num_stories: int,
    validation: Iterable[str],
    save: SaveArrays = compute_arrays,
) -> RepeatedStories:
    """Compare the training stories with the validation stories and with each other; see `drop_repeated`."""

    def compute() -> Arrays:
        leaks = _find_leaks(read_training(), validation, save)
        duplicates = find_duplicates(read_training(), num_stories, save)
        return {**leaks, "first": duplicates.first, "is_exact": duplicates.is_exact}

    found = save("repeated", compute)
    duplicates = Duplicates(first=found["first"], is_exact=found["is_exact"])
    return RepeatedStories(found["leak"], found["leaked"], duplicates)


def _find_leaks(training: Iterable[str], validation: Iterable[str], save: SaveArrays) -> Arrays:
    """Return the results of `Leaks.check`, int64 (num_stories,), and the validation stories that leaked."""
    index = cache(lambda: Leaks(validation))  # large, and not needed if all segments are saved

    def check(stories: Iterable[str]) -> Arrays:
        leak = [index().check(batch) for batch in iter_batches(stories, _LEAK_BATCH_STORIES)]
        return {"leak": np.concatenate(leak), "leaked": np.flatnonzero(index().leaked)}

    found = [
        save(f"leaks-{number:05}", partial(check, stories))
        for number, stories in enumerate(iter_segments(training))
    ]
    empty = [np.zeros(0, np.int64)]
    return {
        "leak": np.concatenate([*empty, *(one["leak"] for one in found)]),
        "leaked": np.unique(np.concatenate([*empty, *(one["leaked"] for one in found)])),
    }

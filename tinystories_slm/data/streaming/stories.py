"""Training stories of a source from any position on, without a file of their own."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from tinystories_slm.config import DataArgs
from tinystories_slm.data.filters.cleaning import Cleaner
from tinystories_slm.data.source_stories import iter_splits, needs_holdout, zero_counts
from tinystories_slm.data.sources.mixture import MixedSplits
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.sources.story_source import ResumedSplit, Splits


@dataclass(frozen=True)
class PartPosition:
    """Position in the training split of one source, or of one part of a mixture."""

    file: int = 0
    """Number of the file that is read."""
    row: int = 0
    """Number of texts of the file that were read."""
    num_stories: int = 0
    """Training stories of the epoch that were read from this part of a mixture; 0 for one source."""


@dataclass(frozen=True)
class StreamPosition:
    """Position between two training stories of an endless stream."""

    epoch: int = 0
    num_read: int = 0
    """Stories of the epoch that were read from the training split, with those that are held out."""
    num_stories: int = 0
    """Training stories of all epochs that were read."""
    parts: list[PartPosition] = field(default_factory=list)
    """One for each part of a mixture, one for another source; none at the start of an epoch."""

    def next_epoch(self) -> Self:
        """Return the start of the next epoch."""
        return StreamPosition(epoch=self.epoch + 1, num_stories=self.num_stories)

    def to_dict(self) -> dict[str, Any]:
        """Return the position as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the position that `to_dict` returned."""
        return cls(**values | {"parts": [PartPosition(**part) for part in values["parts"]]})


def open_training_splits(data: DataArgs, revision: str) -> Splits:
    """Return the splits of `data.source`, read without a copy on this disk.

    Raises:
        UserError: the source does not exist or cannot be reached.
    """
    source = find_source(data.source, data.subset, is_streamed=True)
    return source.open_splits(revision, data.text_column, data.max_stories)


class StoryStream:
    """Training stories of one epoch from a position on: those that a download writes to train.parquet.

    Raises:
        UserError: a file cannot be read; in the iteration.
    """

    def __init__(self, splits: Splits, data: DataArgs, cleaning: list[str], start: StreamPosition) -> None:
        """
        Args:
            splits: Result of `open_training_splits`.
            data: Selection of the stories.
            cleaning: Names of the cleaning rules.
            start: Position of the first story; the files before it are not read.
        """
        self._data = data
        self._clean = Cleaner(cleaning).clean if cleaning else None
        self._start, self._num_read, self._num_stories = start, start.num_read, start.num_stories
        mixed = splits.parts if isinstance(splits, MixedSplits) else []
        sources = [part.splits for part in mixed] or [splits]
        positions = start.parts or [PartPosition()] * len(sources)
        self._resumed = [
            ResumedSplit(one["train"], position.file, position.row)
            for one, position in zip(sources, positions, strict=True)
        ]
        resumed: list[Splits] = [  # the other splits are empty
            dict.fromkeys(one, tuple) | {"train": train}
            for one, train in zip(sources, self._resumed, strict=True)
        ]
        self._splits = resumed[0]
        if mixed:
            self._splits = MixedSplits(
                [
                    replace(part, splits=one, num_read_before=position.num_stories)
                    for part, one, position in zip(mixed, resumed, positions, strict=True)
                ]
            )

    def __iter__(self) -> Iterator[str]:
        data = self._data
        has_holdout = isinstance(self._splits, MixedSplits) or needs_holdout(
            self._splits, data.validation_split
        )
        counts = zero_counts("train", "validation") if has_holdout else zero_counts("train")
        limit = None if data.max_stories is None else data.max_stories - self._num_read
        pairs = iter_splits(
            self._splits, counts, data.validation_split, data.validation_fraction, limit, self._clean
        )
        for split, story in pairs:
            self._num_read += 1
            if split == "train":
                self._num_stories += 1
                yield story

    def position(self) -> StreamPosition:
        """Return the position after the last story."""
        mixed = self._splits.parts if isinstance(self._splits, MixedSplits) else []
        counts = [part.counts["num_train_stories"] for part in mixed] or [0]
        return StreamPosition(
            epoch=self._start.epoch,
            num_read=self._num_read,
            num_stories=self._num_stories,
            parts=[
                PartPosition(part.file, part.row, count)
                for part, count in zip(self._resumed, counts, strict=True)
            ],
        )

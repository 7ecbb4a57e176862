"""Stories of a source, read and cleaned in segments: a killed download continues after the last one."""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.data.filters.cleaning import Cleaner, RuleCounts
from tinystories_slm.data.filters.dropped import DroppedStories
from tinystories_slm.data.progress import SEGMENT_STORIES
from tinystories_slm.data.source_stories import StoryCounts, iter_splits, needs_holdout, zero_counts
from tinystories_slm.data.sources.file_formats import read_parquet
from tinystories_slm.data.sources.mixture import MixedSplits, PartCounts
from tinystories_slm.data.sources.story_source import ResumedSplit, Splits
from tinystories_slm.data.story_files import write_splits
from tinystories_slm.io.atomic import atomic_directory


@dataclass(kw_only=True)
class ReadingState:
    """Contents of `state.json` of a segment: what was read from the start of the source to its end."""

    counts: dict[str, StoryCounts]
    cleaning_counts: dict[str, RuleCounts]
    parts: list[PartCounts] | None
    """Parts of a mixture; null for one source."""
    positions: list[dict[str, tuple[int, int]]]
    """File and row that each split has reached, of each part or of the one source."""
    is_complete: bool = False
    """Whether the source has no more stories."""

    @classmethod
    def load(cls, folder: Path) -> "ReadingState":
        """Return the state at the end of the segment in `folder`."""
        return cls(**json.loads((folder / "state.json").read_text(encoding="utf-8")))

    def save(self, folder: Path) -> None:
        """Write `state.json`."""
        (folder / "state.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def num_stories(self) -> int:
        """Number of stories in all segments."""
        return sum(count["num_stories"] for count in self.counts.values())


@dataclass(frozen=True)
class StorySegments:
    """All stories of a download, in a folder for each segment."""

    folders: list[Path]
    state: ReadingState

    def paths(self, split: str) -> list[Path]:
        """Return the parquet files of `split` ("train", "validation" or "dropped")."""
        return [folder / f"{split}.parquet" for folder in self.folders]

    def read(self, split: str) -> Iterator[str]:
        """Yield the stories of `split` in their order."""
        return (
            story for story in chain.from_iterable(map(read_parquet, self.paths(split))) if story is not None
        )

    def read_dropped(self) -> Iterator[tuple[str, str]]:
        """Yield each story that cleaning dropped, and its rule."""
        for path in self.paths("dropped"):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["text", "rule"]):
                    yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def read_segments(
    splits: Splits, data: DataArgs, rules: Collection[str], max_stories: int | None, folder: Path
) -> StorySegments:
    """Read and clean the stories of `splits` that no segment in `folder` has.

    Raises:
        UserError: the source cannot be read.
    """
    folders = sorted(folder.glob("segment-?????"))
    state = ReadingState.load(folders[-1]) if folders else _initial_state(splits)
    if state.is_complete:
        return StorySegments(folders, state)
    limit = None if max_stories is None else max_stories - _num_read(splits, state, data)
    resumed = _resume(splits, state)
    cleaner = Cleaner(rules, counts=state.cleaning_counts)
    pairs = iter_splits(
        resumed, state.counts, data.validation_split, data.validation_fraction, limit,
        cleaner.clean if rules else None,
    )  # fmt: skip
    read = iter(tqdm(pairs, desc="download", unit=" stories", initial=state.num_stories, disable=None))
    while not state.is_complete:
        folders.append(folder / f"segment-{len(folders):05}")
        with atomic_directory(folders[-1]) as unfinished:
            num_before = state.num_stories
            with DroppedStories(unfinished / "dropped.parquet") as dropped:
                cleaner.on_drop = dropped.add
                write_splits(islice(read, SEGMENT_STORIES), unfinished, state.counts)
            state.is_complete = state.num_stories < num_before + SEGMENT_STORIES
            state.positions = [_positions(one) for one in _origins(resumed)]
            state.parts = resumed.part_counts() if isinstance(resumed, MixedSplits) else None
            state.save(unfinished)
    return StorySegments(folders, state)


def _origins(splits: Splits) -> list[Splits]:
    """Return the splits of each part of a mixture, or those of the one source."""
    return [part.splits for part in splits.parts] if isinstance(splits, MixedSplits) else [splits]


def _initial_state(splits: Splits) -> ReadingState:
    parts = splits.part_counts() if isinstance(splits, MixedSplits) else None
    return ReadingState(
        counts=zero_counts("train", "validation"),
        cleaning_counts={},
        # The choice of the cleaning rules has counted its sample.
        parts=parts and [part | {"num_train_stories": 0, "num_validation_stories": 0} for part in parts],
        positions=[dict.fromkeys(one, (0, 0)) for one in _origins(splits)],
    )


def _positions(splits: Splits) -> dict[str, tuple[int, int]]:
    return {name: (read.file, read.row) for name, read in splits.items() if isinstance(read, ResumedSplit)}


def _num_read(splits: Splits, state: ReadingState, data: DataArgs) -> int:
    """Return the number of stories that were read from training splits, with those that are held out."""
    if state.parts is None:
        numbers = [[state.counts[split]["num_stories"] for split in ("train", "validation")]]
    else:
        numbers = [[part["num_train_stories"], part["num_validation_stories"]] for part in state.parts]
    return sum(
        train + (validation if needs_holdout(one, data.validation_split) else 0)
        for one, (train, validation) in zip(_origins(splits), numbers, strict=True)
    )


def _resume(splits: Splits, state: ReadingState) -> Splits:
    """Return the splits from the positions of `state` on."""
    resumed: list[Splits] = [
        {name: ResumedSplit(read, *positions[name]) for name, read in one.items()}
        for one, positions in zip(_origins(splits), state.positions, strict=True)
    ]
    if not isinstance(splits, MixedSplits) or state.parts is None:
        return resumed[0]
    return MixedSplits(
        [
            replace(
                part,
                splits=one,
                num_read_before=counts["num_train_stories"],
                num_validation_before=counts["num_validation_stories"],
            )
            for part, one, counts in zip(splits.parts, resumed, state.parts, strict=True)
        ]
    )

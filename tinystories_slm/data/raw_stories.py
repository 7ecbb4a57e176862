"""Download the stories of a source once: `raw/train.parquet`, `raw/validation.parquet`, `raw/source.json`."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.config.canaries import parse_canaries
from tinystories_slm.data.filters.cleaning import (
    RULES,
    SAMPLE_STORIES,
    Cleaner,
    RuleCounts,
    choose_rules,
)
from tinystories_slm.data.filters.dropped import DroppedStories, DuplicateCounts, drop_repeated
from tinystories_slm.data.planting import PlantedCanary, check_absent, plant
from tinystories_slm.data.provenance import DataManifest, Provenance, log_rebuild
from tinystories_slm.data.source_stories import (
    StoryCounts,
    empty_split_error,
    iter_splits,
    missing_split_error,
    resolve_revision,
    zero_counts,
)
from tinystories_slm.data.sources.file_formats import read_parquet
from tinystories_slm.data.sources.mixture import MixedSplits, PartCounts
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.sources.story_source import Splits
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_directory, directory_lock

logger = logging.getLogger(__name__)

# A worker tokenizes one row group at a time (`prepare`), so these limits also bound its memory.
_ROW_GROUP_STORIES = 4096
_ROW_GROUP_BYTES = 2**21

STREAMING_SAMPLE = 20_000
"""Stories of each split, the first ones, that are on the disk with `data.streaming`."""


@dataclass(frozen=True, kw_only=True)
class RawManifest(DataManifest):
    """Contents of `raw/source.json`, the manifest of `raw/train.parquet` and `raw/validation.parquet`."""

    splits: dict[str, StoryCounts]
    parts: list[PartCounts] | None = None
    """Parts of a mixture; null for one source."""
    cleaning_counts: dict[str, RuleCounts] | None = None
    """Work of each cleaning rule that found a fault; null without cleaning."""
    duplicates: DuplicateCounts | None = None
    """Repeated stories; null without deduplication."""
    planted: list[PlantedCanary] | None = None
    """Canaries; null without any."""


def download_data(data: DataArgs) -> Path:
    """Write train.parquet, validation.parquet and source.json to `data.data_dir/raw`.

    Existing stories with the same options are kept; others are replaced, with a warning, when the new ones
    are complete.

    Returns:
        The folder `raw`.

    Raises:
        UserError: the source cannot be read, a split is empty, or the folder contains the source itself.
    """
    folder = data.data_dir / "raw"
    check_data_dir(data)
    if _differences(folder, data) != []:
        with directory_lock(data.data_dir, option="data.data_dir"):
            differences = _differences(folder, data)
            if differences != []:
                if differences:
                    check_apart(data.source, "data.data_dir", data.data_dir)  # the old stories are removed
                    log_rebuild("the stories", data.data_dir, differences)
                _download(data, folder)
                return folder
    logger.info("using the existing stories of %s in %s", data.source, folder)
    return folder


def _differences(folder: Path, data: DataArgs) -> list[str] | None:
    """Return one phrase per difference between the stories in `folder` and `data`; None without stories."""
    manifest = folder / "source.json"
    return RawManifest.load(manifest).provenance.differences(data) if manifest.exists() else None


def check_data_dir(data: DataArgs) -> None:
    """Check that a first download would not mix the files of `data.data_dir` with those of the source.

    Raises:
        UserError: the source is inside, above or equal to the folder.
    """
    if not (data.data_dir / "raw" / "source.json").exists():
        check_apart(data.source, "data.data_dir", data.data_dir)


def check_apart(source: str, option: str, folder: Path) -> None:
    """Check that the files of a source on this machine and the folder `folder` of `option` cannot mix.

    Raises:
        UserError: the source is inside, above or equal to `folder`.
    """
    folder_path = folder.resolve()
    for path in (path.resolve() for path in find_source(source).local_paths() if path.exists()):
        if not (path.is_relative_to(folder_path) or folder_path.is_relative_to(path)):
            continue
        relation = "below" if path != folder_path and path.is_relative_to(folder_path) else "at or above"
        raise UserError(
            f"{option} ({folder}): must lie apart from data.source ({source}), which is {relation} it; "
            f"use another --{option}, or move the stories"
        )


def iter_raw_stories(data_dir: Path, split: str) -> Iterator[str]:
    """Yield the downloaded stories of `split` ("train" or "validation") in order."""
    return (story for story in read_parquet(data_dir / "raw" / f"{split}.parquet") if story is not None)


def _download(data: DataArgs, folder: Path) -> None:
    revision = resolve_revision(data.source, data.revision, data.subset)
    source, max_stories = find_source(data.source, data.subset, is_streamed=data.streaming), data.max_stories
    splits = source.open_splits(revision, data.text_column, max_stories)
    if data.streaming:
        max_stories = min(max_stories or STREAMING_SAMPLE, STREAMING_SAMPLE)
        _limit_validation(splits)
    if "train" not in splits:
        raise missing_split_error(data.source, "train", splits)
    counts = zero_counts("train", "validation")
    read = partial(iter_splits, splits, counts, data.validation_split, data.validation_fraction)
    rules = _choose_rules(data, splits)
    has_manifest = (folder / "source.json").exists()
    with atomic_directory(folder, replace=has_manifest) as unfinished, ExitStack() as files:
        cleaner = Cleaner(rules)
        deduplicates = not data.streaming and _is_filtered(data, data.deduplicate)
        if rules or deduplicates:
            dropped = files.enter_context(DroppedStories(unfinished / "dropped.parquet"))
            cleaner.on_drop = dropped.add
        stories = read(max_stories, cleaner.clean if rules else None)
        _write_splits(tqdm(stories, desc="download", unit=" stories", disable=None), unfinished, counts)
        duplicates = _drop_repeated(unfinished, counts, dropped) if deduplicates else None
        planted = _plant_canaries(data, unfinished, counts) if data.canaries else None
        for split, count in counts.items():
            if count["num_stories"] == 0:
                raise empty_split_error(data.source, split, data.validation_fraction)
        manifest = RawManifest(
            provenance=Provenance.from_args(data, revision, cleaning=rules, deduplicated=deduplicates),
            splits=counts,
            parts=splits.part_counts() if isinstance(splits, MixedSplits) else None,
            cleaning_counts=cleaner.counts if rules else None,
            duplicates=duplicates,
            planted=planted,
        )
        manifest.save(unfinished / "source.json")
    for line in format_filters(manifest):
        logger.info(line)


def _limit_validation(splits: Splits) -> None:
    """Replace each validation split by its first stories, those of a sample."""
    for part in [part.splits for part in splits.parts] if isinstance(splits, MixedSplits) else [splits]:
        if "validation" in part:
            part["validation"] = partial(_read_first, part["validation"])


def _read_first(read: Callable[[], Iterable[str | None]]) -> Iterator[str | None]:
    return islice(read(), STREAMING_SAMPLE)


def _is_filtered(data: DataArgs, option: bool | None) -> bool:
    """Whether cleaning or deduplication, as `option` says, applies; never to the stories of the grammar."""
    source = find_source(data.source, data.subset)
    if source.is_builtin_corpus:
        return False
    return source.is_filtered_by_default if option is None else option


def _choose_rules(data: DataArgs, splits: Splits) -> list[str]:
    """Return the cleaning rules that fit the first stories; none without cleaning."""
    if not _is_filtered(data, data.cleaning):
        return []
    counts = zero_counts("train", "validation")  # not those of the download, which reads these stories again
    sample = iter_splits(
        splits, counts, data.validation_split, data.validation_fraction, max_stories=SAMPLE_STORIES
    )
    rules = choose_rules(story for _, story in sample)
    if left_out := [name for name in RULES if name not in rules]:
        logger.warning(
            "cleaning rules that would drop more than a fifth of the first %d stories are not applied: %s",
            SAMPLE_STORIES,
            ", ".join(left_out),
        )
    return rules


def _drop_repeated(folder: Path, counts: dict[str, StoryCounts], dropped: DroppedStories) -> DuplicateCounts:
    """Write train.parquet again without the repeated stories, if there are any, and correct `counts`."""
    path, train = folder / "train.parquet", counts["train"]
    read_train = partial(read_parquet, path)
    validation = read_parquet(folder / "validation.parquet")
    keep, found = drop_repeated(read_train, train["num_stories"], validation, dropped)
    if not keep.all():
        _replace_train(compress(read_train(), keep), folder, train)
    return found


def _plant_canaries(data: DataArgs, folder: Path, counts: dict[str, StoryCounts]) -> list[PlantedCanary]:
    """Write train.parquet again with the canaries, and correct `counts`; return their record.

    Raises:
        UserError: a story, of validation too, contains a canary.
    """
    canaries, train = parse_canaries(data.canaries), counts["train"]
    for split in counts:
        for _ in check_absent(read_parquet(folder / f"{split}.parquet"), split, canaries):
            pass
    stories, records = plant(read_parquet(folder / "train.parquet"), train["num_stories"], canaries)
    _replace_train(stories, folder, train)
    logger.info("planted %d copies of %d canaries", sum(one.count for one in canaries), len(canaries))
    return records


def _replace_train(stories: Iterable[str], folder: Path, counts: StoryCounts) -> None:
    """Write `stories` as the new train.parquet, which may be read meanwhile, and correct its `counts`."""
    (rest := folder / "rest").mkdir()
    counts["num_stories"] = counts["num_bytes"] = 0
    _write_splits((("train", story) for story in stories), rest, {"train": counts})
    (rest / "train.parquet").replace(folder / "train.parquet")
    rest.rmdir()


def format_filters(manifest: RawManifest) -> list[str]:
    """Return one line for each cleaning rule that found a fault, and one on duplicates."""
    lines = [
        f"cleaning, {rule}: {count['num_changed']:,} stories repaired, {count['num_dropped']:,} dropped"
        for rule, count in (manifest.cleaning_counts or {}).items()
    ]
    if manifest.duplicates is not None:
        found = manifest.duplicates
        lines.append(
            f"duplicates: {found['num_exact']:,} exact and {found['num_near']:,} near ones dropped from "
            f"training; {found['num_leaks']:,} training stories dropped, which repeated "
            f"{found['num_validation_leaked']:,} validation stories"
        )
    return lines


def _write_splits(stories: Iterable[tuple[str, str]], folder: Path, counts: dict[str, StoryCounts]) -> None:
    """Write (split, story) pairs to `folder/<split>.parquet`, one row group at a time, and count them."""
    schema = pa.schema({"text": pa.string()})
    with ExitStack() as files:
        writers = {
            split: files.enter_context(
                pq.ParquetWriter(folder / f"{split}.parquet", schema, compression="zstd")
            )
            for split in counts
        }
        rows: dict[str, list[str]] = {split: [] for split in counts}
        num_bytes = dict.fromkeys(counts, 0)

        def write_row_group(split: str) -> None:
            writers[split].write_table(pa.table({"text": rows[split]}, schema=schema))
            counts[split]["num_stories"] += len(rows[split])
            counts[split]["num_bytes"] += num_bytes[split]
            rows[split], num_bytes[split] = [], 0

        for split, story in stories:
            rows[split].append(story)
            num_bytes[split] += len(story.encode("utf-8"))
            if len(rows[split]) == _ROW_GROUP_STORIES or num_bytes[split] >= _ROW_GROUP_BYTES:
                write_row_group(split)
        for split in counts:
            if rows[split]:
                write_row_group(split)

"""Download the stories of a source once: `raw/train.parquet`, `raw/validation.parquet`, `raw/source.json`."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tinystories_slm.config import DataArgs
from tinystories_slm.config.canaries import parse_canaries
from tinystories_slm.data.filters.cleaning import RULES, SAMPLE_STORIES, RuleCounts, choose_rules
from tinystories_slm.data.filters.dropped import DroppedStories, DuplicateCounts, drop_repeated
from tinystories_slm.data.planting import PlantedCanary, check_absent, plant
from tinystories_slm.data.progress import Progress, kept_progress
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
from tinystories_slm.data.story_files import join_files, write_splits
from tinystories_slm.data.story_segments import StorySegments, read_segments
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_directory, directory_lock, remove_directory

logger = logging.getLogger(__name__)

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
    if _differences(folder, data) != [] or _progress_folder(data).exists():
        with directory_lock(data.data_dir, option="data.data_dir"):
            differences = _differences(folder, data)
            if differences != []:
                if differences:
                    check_apart(data.source, "data.data_dir", data.data_dir)  # the old stories are removed
                    log_rebuild("the stories", data.data_dir, differences)
                _download(data, folder)
                return folder
            remove_directory(_progress_folder(data))  # of a preparation with other options, which was stopped
    logger.info("using the existing stories of %s in %s", data.source, folder)
    return folder


def _progress_folder(data: DataArgs) -> Path:
    """Return the folder of what a killed download had done."""
    return data.data_dir / "raw.progress"


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
    rules = _choose_rules(data, splits)
    deduplicates = not data.streaming and _is_filtered(data, data.deduplicate)
    provenance = Provenance.from_args(data, revision, cleaning=rules, deduplicated=deduplicates)
    has_manifest = (folder / "source.json").exists()
    with (
        kept_progress(_progress_folder(data), asdict(provenance)) as progress,
        atomic_directory(folder, replace=has_manifest) as unfinished,
    ):
        segments = read_segments(splits, data, rules, max_stories, progress.folder)
        manifest = _write_raw(data, segments, provenance, progress, unfinished)
        manifest.save(unfinished / "source.json")
    for line in format_filters(manifest):
        logger.info(line)


def _write_raw(
    data: DataArgs, segments: StorySegments, provenance: Provenance, progress: Progress, folder: Path
) -> RawManifest:
    """Write the stories that stay, and those that are dropped, to `folder`."""
    counts, keep, duplicates = segments.state.counts, None, None
    if provenance.cleaning or provenance.deduplicated:
        with DroppedStories(folder / "dropped.parquet") as dropped:
            for text, rule in segments.read_dropped():
                dropped.add(text, rule)
            if provenance.deduplicated:
                keep, duplicates = drop_repeated(
                    partial(segments.read, "train"),
                    counts["train"]["num_stories"],
                    segments.read("validation"),
                    dropped,
                    progress.arrays,
                )
                progress.remove_segments("leaks", "hashes")  # before the stories are copied
    for split, count in counts.items():
        join_files(
            segments.paths(split), folder / f"{split}.parquet", count, keep if split == "train" else None
        )
    planted = _plant_canaries(data, folder, counts) if data.canaries else None
    for split, count in counts.items():
        if count["num_stories"] == 0:
            raise empty_split_error(data.source, split, data.validation_fraction)
    return RawManifest(
        provenance=provenance,
        splits=counts,
        parts=segments.state.parts,
        cleaning_counts=segments.state.cleaning_counts if provenance.cleaning else None,
        duplicates=duplicates,
        planted=planted,
    )


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
    write_splits((("train", story) for story in stories), rest, {"train": counts})
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

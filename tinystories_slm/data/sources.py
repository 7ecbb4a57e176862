"""Download the stories of any source of `source_registry`.

Every source provides splits of stories, one string per story. `download_data` writes the training and
validation stories and their manifest to `data_dir/raw/` once.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.data.cleaning import (
    RULES,
    SAMPLE_STORIES,
    Cleaner,
    RuleCounts,
    check_rules,
    choose_rules,
)
from tinystories_slm.data.dropped import DroppedStories, DuplicateCounts, drop_repeated
from tinystories_slm.data.file_formats import END_OF_TEXT, read_parquet
from tinystories_slm.data.mixture import MixedSplits, PartCounts
from tinystories_slm.data.provenance import DataManifest, Provenance, raise_if_different
from tinystories_slm.data.separators import strip_separators
from tinystories_slm.data.source_registry import find_source
from tinystories_slm.data.story_source import Splits, StorySource
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_directory, directory_lock

if TYPE_CHECKING:
    import datasets  # see `hub`

logger = logging.getLogger(__name__)

# A worker tokenizes one row group at a time (`prepare`), so these limits also bound its memory.
_ROW_GROUP_STORIES = 4096
_ROW_GROUP_BYTES = 2**21


class StoryCounts(TypedDict):
    """Counts of one split: stories kept, their UTF-8 bytes, and dropped blank and null stories."""

    num_stories: int
    num_bytes: int
    num_empty_dropped: int
    num_null_dropped: int


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


def download_data(data: DataArgs) -> Path:
    """Write train.parquet, validation.parquet and source.json to `data.data_dir/raw`.

    Existing stories with the same options are kept.

    Returns:
        The folder `raw`.

    Raises:
        UserError: the source cannot be read, a split is empty, or the folder contains other stories or the
            source itself.
    """
    folder = data.data_dir / "raw"
    manifest = folder / "source.json"
    check_data_dir(data)
    if not manifest.exists():
        with directory_lock(data.data_dir, option="data.data_dir"):
            if not manifest.exists():
                _download(data, folder)
                return folder
    raise_if_different(data.data_dir, RawManifest.load(manifest).provenance.differences(data))
    logger.info("using the existing stories of %s in %s", data.source, folder)
    return folder


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


def load_stories(
    source: str,
    split: str,
    *,
    text_column: str = "text",
    revision: str | None = None,
    validation_split: Literal["auto", "holdout"] | None = "auto",
    validation_fraction: float = 0.05,
    max_stories: int | None = None,
    subset: str | None = None,
) -> datasets.Dataset:
    """Load the stories of one split of any source, as a dataset with the single column "text".

    The arguments are those of `DataArgs`. With `validation_split=None` the splits of the source are used
    unchanged. The dataset is stored in a temporary folder, which is deleted when the process exits.

    Raises:
        UserError: the source or split does not exist, cannot be read, or has no stories.
    """
    splits = _open_splits(source, revision, text_column, max_stories, subset)
    counts = _zero_counts(split)
    pairs = partial(_iter_splits, splits, counts, validation_split, validation_fraction, max_stories)
    if split not in splits and not (split == "validation" and needs_holdout(splits, validation_split)):
        raise _missing_split_error(source, split, splits)
    if next(pairs(), None) is None:  # `datasets` cannot build an empty dataset
        raise _empty_split_error(source, split, validation_fraction)
    return _to_dataset(pairs)


def open_stories(
    source: str,
    *,
    text_column: str = "text",
    revision: str | None = None,
    subset: str | None = None,
    cleaning: Collection[str] = (),
) -> dict[str, Callable[[], Iterator[str]]]:
    """Return the splits of any source: name -> function that yields the stories, without blank ones.

    No story is read before its function is called. `revision` is for Hub datasets only. `cleaning` names
    rules of `cleaning.RULES`.

    Raises:
        UserError: the source does not exist or cannot be read, or there is no such rule.
    """
    check_rules(cleaning)
    clean = Cleaner(cleaning).clean if cleaning else None

    def read_stories(name: str) -> Iterator[str]:
        return (story for _, story in _iter_splits(splits, _zero_counts(name), None, 0.0, None, clean))

    splits = _open_splits(source, revision, text_column, None, subset)
    return {name: partial(read_stories, name) for name in splits}


def resolve_revision(source: str, revision: str | None = None, subset: str | None = None) -> str:
    """Return the exact revision of the stories of `source`.

    Returns:
        The commit of a Hub dataset, `grammar VERSION` for `builtin`, or `sha256:...` of files.

    Raises:
        UserError: the source or revision does not exist, or the Hub cannot be reached.
    """
    return _find_existing(source, revision, subset).resolve_revision(revision)


def in_validation(story: str, fraction: float) -> bool:
    """Whether a holdout split assigns `story` to validation; the text alone decides, so it never moves."""
    prefix = hashlib.sha256(story.encode("utf-8")).digest()[:8]
    return int.from_bytes(prefix, "big") / 2**64 < fraction


def _download(data: DataArgs, folder: Path) -> None:
    revision = resolve_revision(data.source, data.revision, data.subset)
    splits = find_source(data.source, data.subset).open_splits(revision, data.text_column, data.max_stories)
    if "train" not in splits:
        raise _missing_split_error(data.source, "train", splits)
    counts = _zero_counts("train", "validation")
    read = partial(_iter_splits, splits, counts, data.validation_split, data.validation_fraction)
    rules = _choose_rules(data, splits)
    with atomic_directory(folder) as unfinished, ExitStack() as files:
        cleaner = Cleaner(rules)
        deduplicates = _is_filtered(data, data.deduplicate)
        if rules or deduplicates:
            dropped = files.enter_context(DroppedStories(unfinished / "dropped.parquet"))
            cleaner.on_drop = dropped.add
        stories = read(data.max_stories, cleaner.clean if rules else None)
        _write_splits(tqdm(stories, desc="download", unit=" stories", disable=None), unfinished, counts)
        duplicates = _drop_repeated(unfinished, counts, dropped) if deduplicates else None
        for split, count in counts.items():
            if count["num_stories"] == 0:
                raise _empty_split_error(data.source, split, data.validation_fraction)
        manifest = RawManifest(
            provenance=Provenance.from_args(data, revision, cleaning=rules, deduplicated=deduplicates),
            splits=counts,
            parts=splits.part_counts() if isinstance(splits, MixedSplits) else None,
            cleaning_counts=cleaner.counts if rules else None,
            duplicates=duplicates,
        )
        manifest.save(unfinished / "source.json")
    for line in format_filters(manifest):
        logger.info(line)


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
    counts = _zero_counts("train", "validation")  # not those of the download, which reads these stories again
    sample = _iter_splits(
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
        (rest := folder / "rest").mkdir()
        train["num_stories"] = train["num_bytes"] = 0
        _write_splits((("train", story) for story in compress(read_train(), keep)), rest, {"train": train})
        (rest / "train.parquet").replace(path)
        rest.rmdir()
    return found


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


def _iter_splits(
    splits: Splits,
    counts: dict[str, StoryCounts],
    validation_split: Literal["auto", "holdout"] | None,
    fraction: float,
    max_stories: int | None,
    clean: Callable[[str], str | None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (split, story) for the splits in `counts`, reading each once; add dropped stories to `counts`.

    `clean` returns the cleaned story, or None for one that it drops.
    """
    if isinstance(splits, MixedSplits):
        yield from _iter_mixture(splits, counts, validation_split, fraction, max_stories, clean)
        return
    holdout = needs_holdout(splits, validation_split)
    if "train" in counts or (holdout and "validation" in counts):
        dropped = counts["train" if "train" in counts else "validation"]
        for story in islice(_iter_stories(splits["train"](), dropped, clean), max_stories):
            split = "validation" if holdout and in_validation(story, fraction) else "train"
            if split in counts:
                yield split, story
    for split in counts:
        if split != "train" and not (holdout and split == "validation"):
            for story in _iter_stories(splits[split](), counts[split], clean):
                yield split, story


def _iter_mixture(
    mixture: MixedSplits,
    counts: dict[str, StoryCounts],
    validation_split: Literal["auto", "holdout"] | None,
    fraction: float,
    max_stories: int | None,
    clean: Callable[[str], str | None] | None,
) -> Iterator[tuple[str, str]]:
    """Yield the pairs of `_iter_splits` for a mixture; each part has its own validation stories."""
    if not counts.keys() <= {"train", "validation"}:
        for split in counts:
            yield from ((split, story) for story in _iter_stories(mixture[split](), counts[split], clean))
        return
    all_counts = _zero_counts("train", "validation") | counts

    def read_part(splits: Splits, *names: str) -> Iterator[tuple[str, str]]:
        chosen = {name: all_counts[name] for name in names}
        return _iter_splits(splits, chosen, validation_split, fraction, None, clean)

    has_holdout = partial(needs_holdout, validation_split=validation_split)
    for split, story in mixture.iter_pairs(read_part, has_holdout, max_stories):
        if split in counts:
            yield split, story


def _iter_stories(
    texts: Iterable[str | None], counts: StoryCounts, clean: Callable[[str], str | None] | None
) -> Iterator[str]:
    """Yield the cleaned `texts` without nulls and blank texts, and count these in `counts`.

    `<|endoftext|>` at an end of a text separates stories and is removed; within a text it is plain text.
    """
    for text in texts:
        if text is None:
            counts["num_null_dropped"] += 1
            continue
        story = strip_separators(text) if END_OF_TEXT in text else text
        if not story.strip():
            counts["num_empty_dropped"] += 1
        elif clean is None:
            yield story
        elif (cleaned := clean(story)) is not None:
            yield cleaned


def _zero_counts(*splits: str) -> dict[str, StoryCounts]:
    return {
        split: StoryCounts(num_stories=0, num_bytes=0, num_empty_dropped=0, num_null_dropped=0)
        for split in splits
    }


def needs_holdout(splits: Collection[str], validation_split: Literal["auto", "holdout"] | None) -> bool:
    """Whether the validation stories of a source with these splits are held out of its training split."""
    wanted = validation_split == "holdout" or (validation_split == "auto" and "validation" not in splits)
    return wanted and "train" in splits


def _to_dataset(pairs: Callable[[], Iterator[tuple[str, str]]]) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # A temporary folder: the cache of `datasets` in the home directory would grow and become stale.
    cache_dir = tempfile.mkdtemp(prefix="stories-")
    atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
    bars_were_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            lambda: ({"text": story} for _, story in pairs()),
            features=datasets.Features({"text": datasets.Value("string")}),
            cache_dir=cache_dir,
            fingerprint=Path(cache_dir).name,  # otherwise `datasets` pickles the generator to hash it
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def _open_splits(
    source: str, revision: str | None, text_column: str, max_stories: int | None, subset: str | None
) -> Splits:
    """Return the splits of `source` without reading any story."""
    return _find_existing(source, revision, subset).open_splits(revision, text_column, max_stories)


def _find_existing(value: str, revision: str | None, subset: str | None) -> StorySource:
    """Return the source for `value` of `data.source`; UserError if it is a path that does not exist."""
    source = find_source(value, subset)
    source.check_exists()
    if revision is not None and not source.has_revisions:
        raise UserError(
            f"data.revision ({revision}) is only for datasets on the Hub, and data.source ({value}) is not "
            "one; remove data.revision"
        )
    return source


def _missing_split_error(source: str, split: str, splits: Splits) -> UserError:
    available = ", ".join(map(repr, sorted(splits)))
    return UserError(
        f"data.source ({source}) has no split {split!r}, only {available}; use one of these, "
        "or name the split in the file name"
    )


def _empty_split_error(source: str, split: str, fraction: float) -> UserError:
    return UserError(
        f"data.source ({source}) has no {split} stories (data.validation_fraction is {fraction}); "
        "use more stories, or set another fraction"
    )

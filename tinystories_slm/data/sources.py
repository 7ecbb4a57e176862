"""Stories from the built-in grammar, from files on this machine, or from a dataset on the Hub.

Every source gives the same: splits of stories, one string each. `download_data` writes the training
and validation stories to `data_dir/raw/` once, with a record of what they are.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.data import builtin, hub, local
from tinystories_slm.data.artifacts import alone_in, finished_folder
from tinystories_slm.data.formats import READERS, read_parquet
from tinystories_slm.data.origin import BUILTIN, Origin, refuse_other
from tinystories_slm.errors import InputError

if TYPE_CHECKING:
    import datasets  # see `hub`

logger = logging.getLogger(__name__)

BUILTIN_STORIES = 40_000
"""Stories that `builtin` tells where `data.max_stories` is null."""

# A row group is what one worker tokenizes at a time (`prepare`), so it bounds the memory there too.
_ROW_GROUP_STORIES = 4096
_ROW_GROUP_BYTES = 2**21

Splits = dict[str, Callable[[], Iterable[str | None]]]
"""Split name -> its texts, `None` for a null; nothing is read before they are asked for."""


class StoryCounts(TypedDict):
    """Of one split: stories kept, their UTF-8 bytes, and what was dropped on the way."""

    num_stories: int
    num_bytes: int
    num_empty_dropped: int
    num_null_dropped: int


@dataclass(frozen=True, kw_only=True)
class RawStories(Origin):
    """`raw/source.json`: the record of `raw/train.parquet` and `raw/validation.parquet`."""

    splits: dict[str, StoryCounts]


def download_data(data: DataArgs) -> Path:
    """Write the stories to `data.data_dir/raw`: train.parquet, validation.parquet and source.json.

    Stories of the same settings that are there already are left as they are.

    Returns:
        The folder `raw`.

    Raises:
        InputError: the source cannot be read or leaves a split empty, or the folder holds other stories.
    """
    folder = data.data_dir / "raw"
    record = folder / "source.json"
    if not record.exists():
        with alone_in(data.data_dir):
            if not record.exists():
                _download(data, folder)
                return folder
    refuse_other(data.data_dir, RawStories.load(record).differences(data))
    logger.info("the stories of %s are in %s already", data.source, folder)
    return folder


def raw_stories(data_dir: Path, split: str) -> Iterator[str]:
    """The downloaded stories of `split` ("train" or "validation"), in order, as a stream."""
    return (story for story in read_parquet(data_dir / "raw" / f"{split}.parquet") if story is not None)


def load_stories(
    source: str,
    split: str,
    *,
    text_column: str = "text",
    revision: str | None = None,
    validation: Literal["auto", "cut"] | None = "auto",
    validation_fraction: float = 0.05,
    max_stories: int | None = None,
) -> datasets.Dataset:
    """The stories of one split of any source, as a dataset with the one column "text".

    The arguments are those of `DataArgs`; with `validation=None` nothing is cut, and the splits are
    the source's own. The dataset lies in a temporary folder that goes with the process.

    Raises:
        InputError: the source or split cannot be found or read, or has no stories.
    """
    splits = _splits(source, revision, text_column, max_stories)
    counts = _no_counts(split)
    pairs = partial(_stories, splits, counts, validation, validation_fraction, max_stories)
    if split not in splits and not (split == "validation" and _is_cut(splits, validation)):
        raise _no_split(source, split, splits)
    if next(pairs(), None) is None:  # `datasets` makes no dataset of nothing
        raise _empty(source, split, validation_fraction)
    return _to_dataset(pairs)


def resolve_revision(source: str, revision: str | None = None) -> str:
    """What pins the stories of `source` exactly.

    Returns:
        The commit of a Hub dataset, `grammar VERSION` of `builtin`, or `local.digest` of files.

    Raises:
        InputError: there is no such source or revision, or the Hub cannot be reached.
    """
    if _on_hub(source, revision):
        return hub.commit_of(source, revision)
    return f"grammar {builtin.VERSION}" if source == BUILTIN else local.digest(source)


def in_validation(story: str, fraction: float) -> bool:
    """Whether a cut puts `story` on the validation side: by its text alone, so it never changes sides."""
    head = hashlib.sha256(story.encode("utf-8")).digest()[:8]
    return int.from_bytes(head, "big") / 2**64 < fraction


def _download(data: DataArgs, folder: Path) -> None:
    revision = resolve_revision(data.source, data.revision)
    commit = revision if _on_hub(data.source, data.revision) else None
    splits = _splits(data.source, commit, data.text_column, data.max_stories)
    if "train" not in splits:
        raise _no_split(data.source, "train", splits)
    counts = _no_counts("train", "validation")
    stories = _stories(splits, counts, data.validation, data.validation_fraction, data.max_stories)
    with finished_folder(folder) as unfinished:
        _write_splits(tqdm(stories, desc="download", unit=" stories", disable=None), unfinished, counts)
        for split, count in counts.items():
            if count["num_stories"] == 0:
                raise _empty(data.source, split, data.validation_fraction)
        record = RawStories(**Origin.of(data, revision).origin_fields(), splits=counts)
        record.save(unfinished / "source.json")


def _write_splits(stories: Iterable[tuple[str, str]], folder: Path, counts: dict[str, StoryCounts]) -> None:
    """Write (split, story) pairs to `folder/<split>.parquet`, a row group at a time, and count them."""
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


def _stories(
    splits: Splits,
    counts: dict[str, StoryCounts],
    validation: Literal["auto", "cut"] | None,
    fraction: float,
    max_stories: int | None,
) -> Iterator[tuple[str, str]]:
    """(split, story) of the splits that `counts` names, each source read once; drops are counted there."""
    cut = _is_cut(splits, validation)
    if "train" in counts or (cut and "validation" in counts):
        dropped = counts["train" if "train" in counts else "validation"]
        for story in islice(_kept(splits["train"](), dropped), max_stories):
            side = "validation" if cut and in_validation(story, fraction) else "train"
            if side in counts:
                yield side, story
    for split in counts:
        if split != "train" and not (cut and split == "validation"):
            for story in _kept(splits[split](), counts[split]):
                yield split, story


def _kept(texts: Iterable[str | None], counts: StoryCounts) -> Iterator[str]:
    """`texts` without nulls and those of nothing but white space, which are counted."""
    for text in texts:
        if text is None:
            counts["num_null_dropped"] += 1
        elif not text.strip():
            counts["num_empty_dropped"] += 1
        else:
            yield text


def _no_counts(*splits: str) -> dict[str, StoryCounts]:
    return {
        split: StoryCounts(num_stories=0, num_bytes=0, num_empty_dropped=0, num_null_dropped=0)
        for split in splits
    }


def _is_cut(splits: Splits, validation: Literal["auto", "cut"] | None) -> bool:
    wanted = validation == "cut" or (validation == "auto" and "validation" not in splits)
    return wanted and "train" in splits


def _to_dataset(pairs: Callable[[], Iterator[tuple[str, str]]]) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # Not the cache of `datasets` in the user's home: it would grow, and outlive a change of the files.
    cache_dir = tempfile.mkdtemp(prefix="stories-")
    atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
    bars_were_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            lambda: ({"text": story} for _, story in pairs()),
            features=datasets.Features({"text": datasets.Value("string")}),
            cache_dir=cache_dir,
            fingerprint=Path(cache_dir).name,  # else `datasets` pickles the generator to hash it
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def _splits(source: str, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
    """The splits that `source` has, unread."""
    if _on_hub(source, revision):
        splits = hub.load_splits(source, hub.commit_of(source, revision), text_column)
        return {name: partial(hub.texts, split, text_column) for name, split in splits.items()}
    if source == BUILTIN:
        return {"train": partial(builtin.tell_stories, max_stories or BUILTIN_STORIES, seed=0)}
    return {name: partial(_texts, paths, text_column) for name, paths in local.by_split(source).items()}


def is_on_hub(source: str) -> bool:
    """Whether `source` is a Hub id rather than `builtin` or a path.

    Raises:
        InputError: it can only be a path, and does not exist.
    """
    return source != BUILTIN and not local.is_local(source)


def _on_hub(source: str, revision: str | None) -> bool:
    """`is_on_hub`, and a refusal of a revision where there is none to choose."""
    if is_on_hub(source):
        return True
    if revision is not None:
        raise InputError(
            f"data.revision ({revision}) is for datasets on the Hub, and data.source ({source}) is none; "
            "leave it out"
        )
    return False


def _texts(paths: list[Path], text_column: str) -> Iterator[str | None]:
    return chain.from_iterable(READERS[path.suffix.lower()](path, text_column) for path in paths)


def _no_split(source: str, split: str, splits: Splits) -> InputError:
    there = ", ".join(map(repr, sorted(splits)))
    return InputError(
        f"data.source ({source}) has no split {split!r}, only {there}; ask for one of these, "
        "or say the split in the file's name"
    )


def _empty(source: str, split: str, fraction: float) -> InputError:
    return InputError(
        f"data.source ({source}) leaves no {split} stories (data.validation_fraction is {fraction}); "
        "bring more stories, or set another fraction"
    )

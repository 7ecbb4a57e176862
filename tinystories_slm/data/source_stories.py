"""Stories of any source, one string per story, with the split into training and validation stories."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from tinystories_slm.data.filters.cleaning import Cleaner, check_rules
from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.sources.mixture import MixedSplits
from tinystories_slm.data.sources.registry import find_source
from tinystories_slm.data.sources.separators import strip_separators
from tinystories_slm.data.sources.story_source import Splits, StorySource
from tinystories_slm.errors import UserError

if TYPE_CHECKING:
    import datasets  # see `hub`


class StoryCounts(TypedDict):
    """Counts of one split: stories kept, their UTF-8 bytes, and dropped blank and null stories."""

    num_stories: int
    num_bytes: int
    num_empty_dropped: int
    num_null_dropped: int


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
    counts = zero_counts(split)
    pairs = partial(iter_splits, splits, counts, validation_split, validation_fraction, max_stories)
    if split not in splits and not (split == "validation" and needs_holdout(splits, validation_split)):
        raise missing_split_error(source, split, splits)
    if next(pairs(), None) is None:  # `datasets` cannot build an empty dataset
        raise empty_split_error(source, split, validation_fraction)
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
        return (story for _, story in iter_splits(splits, zero_counts(name), None, 0.0, None, clean))

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


def iter_splits(
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
    """Yield the pairs of `iter_splits` for a mixture; each part has its own validation stories."""
    if not counts.keys() <= {"train", "validation"}:
        for split in counts:
            yield from ((split, story) for story in _iter_stories(mixture[split](), counts[split], clean))
        return
    all_counts = zero_counts("train", "validation") | counts

    def read_part(splits: Splits, *names: str) -> Iterator[tuple[str, str]]:
        chosen = {name: all_counts[name] for name in names}
        return iter_splits(splits, chosen, validation_split, fraction, None, clean)

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


def zero_counts(*splits: str) -> dict[str, StoryCounts]:
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


def missing_split_error(source: str, split: str, splits: Splits) -> UserError:
    available = ", ".join(map(repr, sorted(splits)))
    return UserError(
        f"data.source ({source}) has no split {split!r}, only {available}; use one of these, "
        "or name the split in the file name"
    )


def empty_split_error(source: str, split: str, fraction: float) -> UserError:
    return UserError(
        f"data.source ({source}) has no {split} stories (data.validation_fraction is {fraction}); "
        "use more stories, or set another fraction"
    )

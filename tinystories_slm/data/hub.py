"""Stories of a dataset on the Hugging Face Hub, at one commit.

`datasets` is imported where a dataset is loaded: half a second that training, on stories that are there
already, need not wait, and a package that it then need not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from tinystories_slm.errors import InputError

if TYPE_CHECKING:
    import datasets

TIMEOUT_S = 10.0


def commit_of(source: str, revision: str | None = None) -> str:
    """The commit that `revision` (a branch, tag or commit; null for the newest) of `source` is now.

    Raises:
        InputError: there is no such dataset or revision, or the Hub cannot be reached.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision  # nothing to ask, so a dataset in the cache loads without a network
    try:
        commit = HfApi().dataset_info(source, revision=revision, timeout=TIMEOUT_S).sha
    except RevisionNotFoundError as error:
        raise InputError(
            f"data.revision ({revision}) is no branch, tag or commit of {source} on the Hub; correct it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"data.source ({source}) is neither a path here nor a dataset on the Hub that you may read; "
            "correct it, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InputError(
            f"data.source ({source}) is no path here, and the Hub could not be asked for it "
            f"({type(error).__name__}: {_first_line(error)}); correct the name or the connection"
        ) from error
    if commit is None:
        raise InputError(f"data.source ({source}) has no commit on the Hub; choose another dataset")
    return commit


def model_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that `revision` (null for the newest) of the model repository `name` is now.

    None where the Hub cannot be asked, so that only the cache is left; transformers itself would retry for
    most of a minute.

    Raises:
        RepositoryNotFoundError, HFValidationError: there is no such repository that one may read.
        RevisionNotFoundError: it has no such branch, tag or commit.
    """
    try:
        return HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S).sha
    except (RepositoryNotFoundError, HFValidationError, RevisionNotFoundError):
        raise
    except Exception:  # whatever the HTTP library of the day raises
        return None


def load_splits(source: str, commit: str | None, text_column: str) -> dict[str, datasets.Dataset]:
    """Every split of the dataset, with `text_column` alone; kept in the cache of `datasets`.

    Raises:
        InputError: it cannot be fetched, or has no such column of strings.
    """
    import datasets

    try:
        splits = datasets.load_dataset(source, revision=commit)
    except Exception as error:  # what `datasets` raises differs by builder, file system and HTTP library
        raise InputError(
            f"data.source ({source} at {commit}) could not be loaded from the Hub ({_first_line(error)}); "
            "correct the name, the connection or the free disk space"
        ) from error
    return {str(name): _text_alone(split, source, text_column) for name, split in splits.items()}


def texts(split: datasets.Dataset, text_column: str) -> Iterator[str | None]:
    """The column's values, in order, as a stream."""
    for batch in split.iter(batch_size=1024):
        yield from batch[text_column]


def _text_alone(split: datasets.Dataset, source: str, text_column: str) -> datasets.Dataset:
    if text_column not in split.column_names:
        there = ", ".join(map(repr, split.column_names))
        raise InputError(
            f"data.source ({source}) has no column {text_column!r}, only {there}; set data.text_column"
        )
    kind = getattr(split.features[text_column], "dtype", "a nested value")
    if kind not in ("string", "large_string"):
        raise InputError(
            f"data.source ({source}) holds {kind}, not text, in column {text_column!r}; set data.text_column"
        )
    return split.select_columns(text_column)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")

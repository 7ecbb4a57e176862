"""Commits on the Hugging Face Hub, and files and datasets loaded at one commit.

`datasets` is imported lazily: training on prepared data needs neither the package nor its 0.5 s import.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub import DatasetInfo, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from tinystories_slm.data.sources import local
from tinystories_slm.data.sources.file_formats import first_line, format_of, reject_lines
from tinystories_slm.data.sources.hub_files import read_remote_file
from tinystories_slm.data.sources.named_sets import NAMED_SETS, suggest_name
from tinystories_slm.data.sources.selection import select_files, several_subsets_error, story_files
from tinystories_slm.data.sources.separators import log_separators
from tinystories_slm.data.sources.story_source import FileSequence, Splits, StorySource
from tinystories_slm.errors import UserError

if TYPE_CHECKING:
    import datasets

TIMEOUT_S = 10.0
_OF_DATASETS = {".arrow"}


class HubSource(StorySource):
    """A dataset on the Hub; its revision is a commit."""

    has_revisions = True
    needs_network = True
    has_subsets = True

    @classmethod
    def matches(cls, value: str) -> bool:
        return True

    @classmethod
    def matches_record(cls, value: str, revision: str) -> bool:
        return is_commit(revision)

    def resolve_revision(self, requested: str | None) -> str:
        return resolve_dataset_commit(self.value, requested)

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        """Return the splits; `datasets` loads repositories of formats that this package does not read."""
        source, commit = self.value, resolve_dataset_commit(self.value, revision)
        files = select_story_files(source, commit, self.subset)
        if files and self.is_streamed:
            return {
                name: FileSequence(
                    [partial(read_remote_file, source, commit, path, text_column) for path in paths]
                )
                for name, paths in files.items()
            }
        if files:
            return {name: partial(_read_files, source, commit, files, name, text_column) for name in files}
        splits = load_splits(source, commit, text_column, self.subset, is_streamed=self.is_streamed)
        return {name: _open_split(split, source, text_column) for name, split in splits.items()}

    def num_download_bytes(self, revision: str | None, splits: Collection[str]) -> int:
        """Return the bytes of the story files of `splits`; of all files where `datasets` selects them."""
        info = _dataset_info(self.value, revision, files_metadata=True)
        files = story_files_of(info, self.subset)
        names = {name for split in splits for name in files.get(split, ())}
        return sum(file.size or 0 for file in info.siblings or [] if not files or file.rfilename in names)

    @property
    def dataset_id(self) -> str:
        return self.value

    @property
    def is_part_of_revision(self) -> bool:
        return self.subset is not None

    @property
    def license(self) -> str | None:
        """License of a dataset that a named set describes; the page of another one states it."""
        licenses = (named.license for named in NAMED_SETS.values() if named.repository == self.value)
        return next(licenses, None)


def is_commit(revision: str) -> bool:
    """Whether `revision` is a full commit and not a branch or tag."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _read_files(
    source: str, commit: str, files: dict[str, list[str]], split: str, text_column: str
) -> Iterator[str | None]:
    """Download the files of `split`, each when it is needed, and yield their stories.

    The validation files come first. Offline, a cache without them would look like a source without them.
    """
    for file in files.get("validation", []):
        download_file(source, commit, file)
    paths = (download_file(source, commit, file) for file in files[split])
    return chain.from_iterable(local.read_story_file(path, source, text_column) for path in paths)


def _open_split(
    split: datasets.Dataset | datasets.IterableDataset, source: str, text_column: str
) -> FileSequence:
    """Return the stories of a split that `datasets` reads; one of its shards stands for a file."""
    shards = [split]
    if hasattr(split, "num_shards"):  # streamed
        shards = [split.shard(split.num_shards, index) for index in range(split.num_shards)]
    return FileSequence([partial(_read_split, shard, source, text_column) for shard in shards])


def _read_split(
    split: datasets.Dataset | datasets.IterableDataset, source: str, text_column: str
) -> Iterator[str | None]:
    try:
        yield from log_separators(reject_lines(iter_column(split, text_column), source), source)
    except UserError:
        raise
    except Exception as error:  # of a streamed split: the types depend on builder and HTTP library
        raise _load_error(source, None, error) from error


def resolve_dataset_commit(source: str, revision: str | None = None) -> str:
    """Return the current commit of `revision` (a branch, tag or commit; None for the newest) of `source`.

    Raises:
        UserError: the dataset or revision does not exist, or the Hub cannot be reached.
    """
    if revision is not None and is_commit(revision):
        return revision  # no request needed, so a cached dataset loads offline
    commit = _dataset_info(source, revision).sha
    if commit is None:
        raise UserError(f"data.source ({source}) has no commit on the Hub; use another dataset")
    return commit


def _dataset_info(source: str, revision: str | None, **options: bool) -> DatasetInfo:
    """Return the description of a dataset; UserError if the Hub does not provide it."""
    try:
        return HfApi().dataset_info(source, revision=revision, timeout=TIMEOUT_S, **options)
    except RevisionNotFoundError as error:
        raise UserError(
            f"data.revision ({revision}) is not a branch, tag or commit of {source} on the Hub; correct it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"data.source ({source}) is neither an existing path nor a dataset on the Hub that you can read; "
            f"correct it, or log in with `hf auth login` if it is private{suggest_name(source)}"
        ) from error
    except Exception as error:  # the exception types depend on the HTTP library
        raise UserError(
            f"data.source ({source}) is not an existing path, and the Hub cannot be reached "
            f"({type(error).__name__}: {first_line(error)}); correct the name or check the connection"
            f"{suggest_name(source)}"
        ) from error


def resolve_model_commit(name: str, revision: str | None = None) -> str | None:
    """Return the current commit of `revision` (None for the newest) of the model repository `name`.

    Return None if the Hub cannot be reached, so that the caller uses only the cache; transformers itself
    would retry for most of a minute.

    Raises:
        RepositoryNotFoundError, HFValidationError: no readable repository has this name.
        RevisionNotFoundError: the repository has no such branch, tag or commit.
    """
    try:
        return HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S).sha
    except (RepositoryNotFoundError, HFValidationError, RevisionNotFoundError):
        raise
    except Exception:  # the exception types depend on the HTTP library
        return None


def list_files(source: str, revision: str) -> dict[str, int]:
    """Return the size in bytes of each file of a dataset; without a connection, of the files in the cache.

    Raises:
        UserError: the dataset or revision does not exist, or the Hub cannot be reached and no file is cached.
    """
    try:
        info = _dataset_info(source, revision, files_metadata=True)
    except UserError:
        folder = _cached_snapshot(source, revision)
        if folder is None:
            raise
        files = (file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _cached_snapshot(source: str, revision: str) -> Path | None:
    try:
        return Path(snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:  # nothing is in the cache
        return None


def select_story_files(source: str, commit: str, subset: str | None = None) -> dict[str, list[str]]:
    """Return the story files of a dataset by split, as of the same folder on disk.

    Without a connection these are the files in the cache. The result is empty if only `datasets` can read it.

    Raises:
        UserError: the dataset has no configuration `subset`, or several and no default.
    """
    try:
        info = HfApi().dataset_info(source, revision=commit, timeout=TIMEOUT_S, files_metadata=True)
    except Exception:  # the exception types depend on the HTTP library
        return _cached_story_files(source, commit, subset)
    return story_files_of(info, subset)


def story_files_of(info: DatasetInfo, subset: str | None = None) -> dict[str, list[str]]:
    """Return the story files of the dataset that `info` describes, by split; see `select_story_files`."""
    paths = [PurePosixPath(file.rfilename) for file in info.siblings or []]
    formats = {format_of(path) for path in story_files(paths)}
    # Beside these, a text or JSON file is rarely the data.
    if not formats or (".parquet" not in formats and any(path.suffix in _OF_DATASETS for path in paths)):
        return {}
    card = info.card_data.to_dict() if info.card_data else {}
    splits = select_files(paths, info.id, card.get("configs") or (), subset)
    return {split: [str(path) for path in files] for split, files in splits.items()}


def _cached_story_files(source: str, commit: str, subset: str | None) -> dict[str, list[str]]:
    try:
        folder = Path(snapshot_download(source, repo_type="dataset", revision=commit, local_files_only=True))
        splits = local.files_by_split(str(folder), subset)
    except Exception:  # nothing is in the cache
        return {}
    return {split: [file.relative_to(folder).as_posix() for file in files] for split, files in splits.items()}


def download_file(source: str, commit: str, file: str) -> Path:
    """Download a file of a dataset to the cache of the Hub, unless it is there, and return its path.

    Raises:
        UserError: the file cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(source, file, repo_type="dataset", revision=commit))
    except Exception as error:  # the types depend on file system and HTTP library
        raise _load_error(source, commit, error) from error


def load_splits(
    source: str, commit: str | None, text_column: str, subset: str | None = None, *, is_streamed: bool = False
) -> dict[str, datasets.Dataset] | dict[str, datasets.IterableDataset]:
    """Load every split of the dataset, reduced to `text_column`, through the cache of `datasets`.

    With `is_streamed`, the splits are read over the network, without a copy.

    Raises:
        UserError: the dataset cannot be loaded, or has no such column of strings.
    """
    import datasets

    try:
        options = ({"name": subset} if subset else {}) | ({"streaming": True} if is_streamed else {})
        splits = datasets.load_dataset(source, **options, revision=commit)
    except Exception as error:  # the types depend on builder, file system and HTTP library
        raise _load_error(source, commit, error) from error
    return {str(name): _select_text_column(split, source, text_column) for name, split in splits.items()}


def iter_column(split: datasets.Dataset | datasets.IterableDataset, text_column: str) -> Iterator[str | None]:
    """Yield the values of column `text_column` in order."""
    for batch in split.iter(batch_size=1024):
        yield from batch[text_column]


def _load_error(source: str, commit: str | None, error: Exception) -> UserError:
    # `datasets` lists the configurations in the second line.
    if several := re.search(r"Config name is missing.*configs: \[(.*?)\]", str(error), re.DOTALL):
        return several_subsets_error(source, re.findall(r"'([^']+)'", several[1]))
    return UserError(
        f"data.source ({source} at {commit}) cannot be loaded from the Hub ({first_line(error)}); "
        "check the name, the connection and the free disk space"
    )


def _select_text_column(
    split: datasets.Dataset | datasets.IterableDataset, source: str, text_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    if split.features is None:  # streamed, and known only from the rows
        split = split._resolve_features()
    if text_column not in split.column_names:
        columns = ", ".join(map(repr, split.column_names))
        raise UserError(
            f"data.source ({source}) has no column {text_column!r}, only {columns}; set data.text_column"
        )
    dtype = getattr(split.features[text_column], "dtype", "nested values")
    if dtype not in ("string", "large_string"):
        raise UserError(
            f"data.source ({source}): column {text_column!r} must contain strings, not {dtype}; "
            "set data.text_column"
        )
    return split.select_columns(text_column)

"""Local story files: selection of files and splits by name, and a hash of their contents."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePath, PurePosixPath

import yaml
from huggingface_hub import metadata_load

from tinystories_slm.data.sources.file_formats import (
    KNOWN_FORMATS,
    READERS,
    format_of,
    is_archive,
    list_archive,
    read_archive,
    read_file,
)
from tinystories_slm.data.sources.selection import Config, group_by_split, select_files, visible
from tinystories_slm.data.sources.separators import log_separators
from tinystories_slm.data.sources.story_source import FileSequence, Splits, StorySource
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.io.file_errors import expand_user

# No Hub id ends in these suffixes, so a mistyped path is not looked up on the Hub.
_FILE_SUFFIXES = {*READERS, ".arrow", ".gz", ".md", ".tar", ".tgz", ".xz", ".zip", ".zst"}


class LocalSource(StorySource):
    """A file, folder or tar archive on this machine; its revision is the `content_hash` of the files."""

    has_subsets = True

    @classmethod
    def matches(cls, value: str) -> bool:
        if not value or value.startswith((".", "/", "~")) or value.count("/") > 1:
            return True
        # Not `Path.exists`: it raises for a name that is too long for the file system.
        return Path(value).suffix.lower() in _FILE_SUFFIXES or os.path.exists(value)

    @classmethod
    def matches_record(cls, value: str, revision: str) -> bool:
        return revision.startswith("sha256:")

    def resolve_revision(self, requested: str | None) -> str:
        return content_hash(self.value, self.subset)

    def open_splits(self, revision: str | None, text_column: str, max_stories: int | None) -> Splits:
        return {
            name: open_files(paths, self.value, text_column)
            for name, paths in files_by_split(self.value, self.subset).items()
        }

    def local_path(self) -> Path:
        return expand_user(self.value)

    def public_name(self) -> str:
        return self.local_path().resolve().name


def open_files(paths: Iterable[PurePath], source: str, text_column: str) -> FileSequence:
    """Return the stories of all files in order; each archive is one file, and read once."""
    files: list[Callable[[], Iterator[str | None]]] = []
    for archive, group in groupby(paths, key=archive_of):
        if archive is None:
            files += [partial(read_story_file, path, source, text_column) for path in group]
        else:
            members = {path.relative_to(archive).as_posix() for path in group}
            files.append(partial(_read_archive, archive, members, source, text_column))
    return FileSequence(files)


def read_story_file(path: PurePath, source: str, text_column: str) -> Iterator[str | None]:
    """Yield the stories of one file that is no archive.

    Raises:
        UserError: the file cannot be read.
    """
    return log_separators(read_file(path, text_column), source)


def _read_archive(
    archive: PurePath, members: set[str], source: str, text_column: str
) -> Iterator[str | None]:
    return log_separators(read_archive(archive, members.__contains__, text_column), source)


def files_by_split(source: str, subset: str | None = None, *, warn: bool = True) -> dict[str, list[Path]]:
    """Group the story files of a file, folder or tar archive by split; see `selection.select_files`.

    The path of a file in an archive continues the path of the archive.

    Raises:
        UserError: `source` contains no file of a known format, or no configuration `subset`.
    """
    root = expand_user(source)
    if root.is_file() and not is_archive(root) and subset is None:
        _check_format(root, source)
        return {split: [root] for split in group_by_split([PurePosixPath(root.name)], source)}
    if root.is_file():
        paths = list_archive(root) if is_archive(root) else [PurePosixPath(root.name)]
        selected = select_files(paths, source, subset=subset, warn=warn)
    else:
        selected = select_files(_list_folder(root), source, _read_configs(root), subset, warn=warn)
    return {split: [root / path for path in paths] for split, paths in selected.items()}


def archive_of(path: PurePath) -> Path | None:
    """Return the tar archive on this disk that contains `path`, or None for another file."""
    if not isinstance(path, Path):
        return None
    return next((parent for parent in path.parents if is_archive(parent) and parent.is_file()), None)


def content_hash(source: str, subset: str | None = None) -> str:
    """Return `sha256:` and the hash of a file, or of the `sha256sum` listing of a folder's story files."""
    root = expand_user(source)
    if root.is_file():
        _check_format(root, source)
        return f"sha256:{file_sha256(root)}"
    splits = files_by_split(source, subset, warn=False)
    files = sorted({archive_of(file) or file for files in splits.values() for file in files})
    listing = "".join(f"{file_sha256(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _check_format(file: Path, source: str) -> None:
    if format_of(file) is None and not is_archive(file):
        raise UserError(f"data.source ({source}) must end in one of {KNOWN_FORMATS}")


def _list_folder(folder: Path) -> list[PurePosixPath]:
    """Return the relative paths of the files in `folder`; of those in its archives if it has no other."""
    paths = visible(
        PurePosixPath(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file()
    )
    if any(format_of(path) for path in paths):
        return paths
    archives = [path for path in paths if is_archive(path)]
    return [archive / member for archive in archives for member in list_archive(folder / archive)]


def _read_configs(folder: Path) -> Sequence[Config]:
    """Return `configs` of the metadata in the folder's README.md, which `hf download` leaves there."""
    try:
        configs = (metadata_load(folder / "README.md") or {}).get("configs")
    except (OSError, ValueError, yaml.YAMLError):  # no README.md, or one of another kind
        return ()
    return configs if isinstance(configs, list) else ()

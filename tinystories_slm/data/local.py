"""Local story files: selection of files and splits by name, and a hash of their contents."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import metadata_load

from tinystories_slm.data.file_formats import KNOWN_FORMATS, READERS, format_of, is_archive, list_archive
from tinystories_slm.data.selection import Config, group_by_split, select_files, visible
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.io.file_errors import expand_user

# No Hub id ends in these suffixes, so a mistyped path is not looked up on the Hub.
_FILE_SUFFIXES = {*READERS, ".arrow", ".csv", ".gz", ".md", ".tar", ".tgz", ".tsv", ".xz", ".zip", ".zst"}
_RESERVED_NAMES = {"", "builtin", "quickstart"}  # of the built-in corpus and its run
_MAX_NAME_BYTES = 150  # file systems take 255, and names of temporary folders are longer


def is_local(source: str) -> bool:
    """Whether `source` is a path on this machine rather than a Hub id.

    Raises:
        UserError: `source` can only be a path and does not exist.
    """
    path = expand_user(source)
    if source and path.exists():
        return True
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not source or looks_like_path or path.suffix.lower() in _FILE_SUFFIXES:
        raise UserError(f"data.source ({source!r}) does not exist; correct the path")
    return False


def check_apart(source: str, option: str, folder: Path) -> None:
    """Check that the files of a local source and the folder `folder` of `option` cannot mix.

    Raises:
        UserError: the source is inside, above or equal to `folder`.
    """
    path, folder_path = expand_user(source), folder.resolve()
    if not path.exists():
        return
    path = path.resolve()
    if path.is_relative_to(folder_path) or folder_path.is_relative_to(path):
        relation = "below" if path != folder_path and path.is_relative_to(folder_path) else "at or above"
        raise UserError(
            f"{option} ({folder}): must lie apart from data.source ({source}), which is {relation} it; "
            f"use another --{option}, or move the stories"
        )


def folder_name(source: str) -> str:
    """Return a folder name for the data and runs of `source`: its path or Hub id with `--` for each `/`.

    Two sources share no name, whether they exist or not. Paths below the current folder are relative to it.
    A hash follows other paths, long ones, and those that contain `--`.
    """
    path, here = Path(os.path.abspath(os.path.expanduser(source))), Path.cwd()
    is_below = path.is_relative_to(here)
    shown = path.relative_to(here) if is_below else path
    name = _join_parts(shown)
    encoded = os.fsencode(name)
    is_unique = is_below and name not in _RESERVED_NAMES and not any("--" in part for part in shown.parts)
    if not is_unique or len(encoded) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(shown)).hexdigest()[:8]
        name = f"{encoded[:_MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"
    return name


def _join_parts(path: Path) -> str:
    return "--".join(part.strip("/\\:") for part in path.parts if part.strip("/\\:"))


def files_by_split(source: str, *, warn: bool = True) -> dict[str, list[Path]]:
    """Group the story files of a file, folder or tar archive by split; see `selection.select_files`.

    The path of a file in an archive continues the path of the archive.

    Raises:
        UserError: `source` contains no file of a known format.
    """
    root = expand_user(source)
    if root.is_file() and not is_archive(root):
        _check_format(root, source)
        return {split: [root] for split in group_by_split([PurePosixPath(root.name)], source)}
    if root.is_file():
        selected = select_files(list_archive(root), source, warn=warn)
    else:
        selected = select_files(_list_folder(root), source, _read_configs(root), warn=warn)
    return {split: [root / path for path in paths] for split, paths in selected.items()}


def archive_of(path: Path) -> Path | None:
    """Return the tar archive that contains `path`, or None for a file on disk."""
    return next((parent for parent in path.parents if is_archive(parent) and parent.is_file()), None)


def content_hash(source: str) -> str:
    """Return `sha256:` and the hash of a file, or of the `sha256sum` listing of a folder's story files."""
    root = expand_user(source)
    if root.is_file():
        _check_format(root, source)
        return f"sha256:{file_sha256(root)}"
    splits = files_by_split(source, warn=False)
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

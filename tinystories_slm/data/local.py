"""Story files on this machine: which of a folder's files are read, for which split, and their digest."""

import hashlib
import logging
import re
from pathlib import Path, PurePath

from tinystories_slm.data.artifacts import sha256_of
from tinystories_slm.data.formats import READERS
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

# What `datasets` looks for in file and folder names.
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Suffixes that no Hub id ends in, so that a mistyped path is not looked up on the Hub.
_FILE_SUFFIXES = {*READERS, ".arrow", ".csv", ".gz", ".md", ".tsv", ".zip", ".zst"}


def is_local(source: str) -> bool:
    """Whether `source` is a path on this machine rather than a Hub id.

    Raises:
        InputError: it can only be a path, and does not exist.
    """
    path = Path(source).expanduser()
    if source and path.exists():
        return True
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not source or looks_like_path or path.suffix.lower() in _FILE_SUFFIXES:
        raise InputError(f"data.source ({source!r}) does not exist; correct the path")
    return False


def story_files(source: str) -> list[Path]:
    """The files that are read, sorted by path: `source` itself, or its folder's first format in `READERS`.

    Raises:
        InputError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"data.source ({source}) must end in one of {', '.join(READERS)}")
        return [path]
    if not (found := _by_suffix(path)):
        raise InputError(f"data.source ({source}) holds no file that ends in one of {', '.join(READERS)}")
    return next(iter(found.values()))


def by_split(source: str) -> dict[str, list[Path]]:
    """The files of `source` by the split that their names say; where none says train, the unnamed are."""
    root = Path(source).expanduser()
    files = story_files(source)
    if root.is_dir() and len(suffixes := list(_by_suffix(root))) > 1:
        logger.warning("%s: reading %s, leaving out %s", source, suffixes[0], ", ".join(suffixes[1:]))
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        if name := _split_in_name(file.relative_to(root) if root.is_dir() else PurePath(file.name)):
            splits.setdefault(name, []).append(file)
        else:
            unnamed.append(file)
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    elif unnamed:
        names = ", ".join(file.name for file in unnamed)
        logger.warning("%s: leaving out %s, whose names say no split", source, names)
    return splits


def digest(source: str) -> str:
    """`sha256:` and the digest of a file's bytes, or of the `sha256sum` listing of a folder's story files."""
    root = Path(source).expanduser()
    files = story_files(source)
    if root.is_file():
        return f"sha256:{sha256_of(root)}"
    listing = "".join(f"{sha256_of(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _by_suffix(folder: Path) -> dict[str, list[Path]]:
    """Its files that can be read, hidden ones aside, sorted by path; suffixes in the order of `READERS`."""
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    by_suffix = {suffix: [file for file in visible if file.suffix.lower() == suffix] for suffix in READERS}
    return {suffix: files for suffix, files in by_suffix.items() if files}


def _split_in_name(path: PurePath) -> str | None:
    """The split a path names, the file before its folders: validation for `TinyStoriesV2-GPT4-valid.txt`."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None

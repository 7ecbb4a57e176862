"""Local story files: selection of files and splits by name, and a hash of their contents."""

import hashlib
import logging
import re
from pathlib import Path, PurePath

from tinystories_slm.data.file_formats import READERS
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import file_sha256

logger = logging.getLogger(__name__)

# Split keywords in file and folder names, as in `datasets`.
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# No Hub id ends in these suffixes, so a mistyped path is not looked up on the Hub.
_FILE_SUFFIXES = {*READERS, ".arrow", ".csv", ".gz", ".md", ".tsv", ".zip", ".zst"}


def is_local(source: str) -> bool:
    """Whether `source` is a path on this machine rather than a Hub id.

    Raises:
        UserError: `source` can only be a path and does not exist.
    """
    path = Path(source).expanduser()
    if source and path.exists():
        return True
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not source or looks_like_path or path.suffix.lower() in _FILE_SUFFIXES:
        raise UserError(f"data.source ({source!r}) does not exist; correct the path")
    return False


def list_story_files(source: str) -> list[Path]:
    """Return the story files of `source`, sorted by path.

    The result is `source` itself if it is a file, else the files of the first format in `READERS` that the
    folder contains.

    Raises:
        UserError: `source` contains no file of a known format.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"data.source ({source}) must end in one of {', '.join(READERS)}")
        return [path]
    if not (found := _files_by_suffix(path)):
        raise UserError(
            f"data.source ({source}) must contain a file that ends in one of {', '.join(READERS)}"
        )
    return next(iter(found.values()))


def files_by_split(source: str) -> dict[str, list[Path]]:
    """Group the files of `source` by the split in their names.

    If no name contains a train keyword, the files without a keyword are the training split; otherwise they
    are skipped with a warning.
    """
    root = Path(source).expanduser()
    files = list_story_files(source)
    if root.is_dir() and len(suffixes := list(_files_by_suffix(root))) > 1:
        logger.warning(
            "%s: reading %s files, skipping %s files", source, suffixes[0], ", ".join(suffixes[1:])
        )
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        if name := _split_from_name(file.relative_to(root) if root.is_dir() else PurePath(file.name)):
            splits.setdefault(name, []).append(file)
        else:
            unnamed.append(file)
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    elif unnamed:
        names = ", ".join(file.name for file in unnamed)
        logger.warning("%s: skipping %s (no split in the file name)", source, names)
    return splits


def content_hash(source: str) -> str:
    """Return `sha256:` and the hash of a file, or of the `sha256sum` listing of a folder's story files."""
    root = Path(source).expanduser()
    files = list_story_files(source)
    if root.is_file():
        return f"sha256:{file_sha256(root)}"
    listing = "".join(f"{file_sha256(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _files_by_suffix(folder: Path) -> dict[str, list[Path]]:
    """Readable files by suffix, in the order of `READERS`, sorted by path; hidden files are skipped."""
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    by_suffix = {suffix: [file for file in visible if file.suffix.lower() == suffix] for suffix in READERS}
    return {suffix: files for suffix, files in by_suffix.items() if files}


def _split_from_name(path: PurePath) -> str | None:
    """Return the split in a path, or None; for example, validation for `TinyStoriesV2-GPT4-valid.txt`.

    The file name takes precedence over folder names, and an inner folder over an outer one.
    """
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None

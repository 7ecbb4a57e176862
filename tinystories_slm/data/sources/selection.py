"""Selection of the story files of a folder, an archive or a Hub repository.

The functions take paths relative to its root, so a Hub repository is read as the same folder on disk is.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeVar

from tinystories_slm.data.sources.file_formats import KNOWN_FORMATS, READERS, format_of
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]
"""Entry of `configs` in the metadata of a dataset's README.md."""
AnyPath = TypeVar("AnyPath", bound=PurePath)

# Split keywords in file and folder names, as in `datasets`.
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Files of a known format that `datasets`, git and people put beside the stories.
_NOT_STORIES = {"dataset_infos", "dataset_info", "state", "readme", "license", "licence", "requirements"}


def select_files(
    paths: Iterable[PurePosixPath],
    source: str,
    configs: Sequence[Config] = (),
    subset: str | None = None,
    *,
    warn: bool = True,
) -> dict[str, list[PurePosixPath]]:
    """Group the story files among `paths` by split.

    With `configs`, the one named `subset` decides, or the default one. Otherwise these are the files of the
    first format in `READERS`, grouped by the split in their names. If no name contains a train keyword, the
    files without a keyword are the training split; otherwise they are skipped. Skipped files are logged if
    `warn` is set.

    Raises:
        UserError: there is no story file, no configuration named `subset`, or several and no default one.
    """
    files = story_files(paths)
    if configs and (splits := _select_by_config(files, source, configs, subset)):
        return splits
    if subset is not None:
        raise _missing_subset_error(source, subset, configs)
    if not files:
        raise UserError(f"data.source ({source}) must contain a file that ends in one of {KNOWN_FORMATS}")
    suffixes = [suffix for suffix in READERS if any(format_of(path) == suffix for path in files)]
    if len(suffixes) > 1 and warn:
        logger.warning(
            "%s: reading %s files, skipping %s files", source, suffixes[0], ", ".join(suffixes[1:])
        )
    return group_by_split([path for path in files if format_of(path) == suffixes[0]], source, warn=warn)


def group_by_split(
    files: Iterable[PurePosixPath], source: str, *, warn: bool = True
) -> dict[str, list[PurePosixPath]]:
    """Group story files by the split in their names; see `select_files`."""
    splits: dict[str, list[PurePosixPath]] = {}
    unnamed = []
    for file in files:
        if name := _split_from_name(file):
            splits.setdefault(name, []).append(file)
        else:
            unnamed.append(file)
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    elif unnamed and warn:
        names = ", ".join(file.name for file in unnamed)
        logger.warning("%s: skipping %s (no split in the file name)", source, names)
    return splits


def story_files(paths: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Return the paths of a known format, sorted; metadata and licences are not stories."""
    return [path for path in visible(paths) if format_of(path) and _stem(path) not in _NOT_STORIES]


def visible(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """Return the relative `paths` without hidden files and folders, sorted."""
    return sorted(path for path in paths if not any(part.startswith((".", "_")) for part in path.parts))


def _stem(path: PurePath) -> str:
    return path.name.split(".")[0].lower()


def _split_from_name(path: PurePath) -> str | None:
    """Return the split in a path, or None; for example, validation for `TinyStoriesV2-GPT4-valid.txt`.

    The file name takes precedence over folder names, and an inner folder over an outer one.
    """
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def _select_by_config(
    files: Sequence[PurePosixPath], source: str, configs: Sequence[Config], subset: str | None
) -> dict[str, list[PurePosixPath]]:
    """Group `files` by the splits of the chosen configuration; empty if it matches no file."""
    config = _choose_config(source, configs, subset)
    prefix = f"{config['data_dir']}/" if config.get("data_dir") else ""
    data_files = config.get("data_files")
    if data_files is None:
        within = [path for path in files if path.is_relative_to(prefix or ".")]
        return group_by_split(within, source) if prefix else {}
    splits: dict[str, list[PurePosixPath]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, patterns = (entry["split"], entry["path"]) if isinstance(entry, Mapping) else ("train", entry)
        matches = [
            path
            for pattern in (patterns if isinstance(patterns, list) else [patterns])
            for path in files
            if _translate_glob(prefix + pattern).fullmatch(str(path))
        ]
        if matches:
            splits.setdefault(_SPLIT_OF_WORD.get(split, split), []).extend(matches)
    return splits


def _choose_config(source: str, configs: Sequence[Config], subset: str | None) -> Config:
    """Return the configuration `subset`; without it the only one, or the one marked or named as default."""
    if subset is not None:
        chosen = [config for config in configs if config.get("config_name") == subset]
        if not chosen:
            raise _missing_subset_error(source, subset, configs)
        return chosen[0]
    default = [
        config for config in configs if config.get("default") or config.get("config_name") == "default"
    ]
    if len(configs) == 1 or default:
        return (default or configs)[0]
    raise several_subsets_error(source, [str(config.get("config_name")) for config in configs])


def several_subsets_error(source: str, names: Iterable[str]) -> UserError:
    """Error that the source has several configurations, of which none is chosen or the default."""
    listed = ", ".join(map(repr, names))
    return UserError(
        f"data.source ({source}) has the configurations {listed} and no default; "
        "set data.subset to one of these"
    )


def _missing_subset_error(source: str, subset: str, configs: Sequence[Config]) -> UserError:
    names = ", ".join(repr(config.get("config_name")) for config in configs)
    if not names:
        return UserError(
            f"data.subset ({subset}): {source} has no configurations in its README.md; remove data.subset"
        )
    return UserError(
        f"data.subset ({subset}): must be a configuration of {source} with files, one of {names}; "
        "use one of these"
    )


def match_paths(paths: Iterable[str], pattern: str) -> list[str]:
    """Return the `paths` that match a pattern as in `configs`, sorted."""
    return sorted(path for path in paths if matches_any((pattern,), path))


def matches_any(patterns: Iterable[str], path: str) -> bool:
    """Whether `path` matches one of `patterns`, which are as in `configs`."""
    return any(_translate_glob(pattern).fullmatch(path) for pattern in patterns)


def _translate_glob(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of files: `*` and `?` stay within a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meanings.get(part, part if index % 2 else re.escape(part)) for index, part in enumerate(parts)
        )
    )

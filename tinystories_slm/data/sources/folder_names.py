"""Names of folders for the data and runs of a source."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tinystories_slm.data.sources.named_sets import NAMED_SETS

_RESERVED_NAMES = {
    "",
    "builtin",
    "builtin-instruct",
    "quickstart",
    *NAMED_SETS,
}  # of other sources, and of a run
_MAX_NAME_BYTES = 150  # file systems take 255, and names of temporary folders are longer


def folder_name(source: str) -> str:
    """Return a folder name for the data and runs of `source`: its path or Hub id with `--` for each `/`.

    Two sources share no name, whether they exist or not. Paths below the current folder are relative to it.
    A hash follows other paths, long ones, and those that contain `--` or a colon.
    """
    path, here = Path(os.path.abspath(os.path.expanduser(source))), Path.cwd()
    is_below = path.is_relative_to(here)
    shown = path.relative_to(here) if is_below else path
    name = _join_parts(shown)
    encoded = os.fsencode(name)
    is_joined = any("--" in part or ":" in part for part in shown.parts)
    is_unique = is_below and name not in _RESERVED_NAMES and not is_joined
    if not is_unique or len(encoded) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(shown)).hexdigest()[:8]
        name = f"{encoded[:_MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"
    return name


def mixture_name(source: str, parts: Iterable[str]) -> str:
    """Return a folder name for the mixture `source` of `parts`: the parts with `+`, and a hash of all."""
    shown = re.sub(r"[^\w.+-]", "-", "+".join(parts), flags=re.ASCII)
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    return f"{shown[:_MAX_NAME_BYTES]}-{digest}"


def _join_parts(path: Path) -> str:
    parts = (part.strip("/\\:").replace(":", "-") for part in path.parts)  # Windows reserves the colon
    return "--".join(filter(None, parts))

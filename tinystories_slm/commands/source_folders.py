"""Folders of the quickstart for a source other than the built-in corpus."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from tinystories_slm.config import RunConfig
from tinystories_slm.data.provenance import BUILTIN


def use_own_folders(config: RunConfig) -> RunConfig:
    """Replace the folders of the built-in corpus, `data/builtin` and `runs/quickstart`, for another source.

    The new name is the last part of the source and a hash of the whole: sources of the same name get
    different folders, and no source is its own `data_dir`. Other folders are kept.
    """
    source, data_dir, output_dir = config.data.source, config.data.data_dir, config.output_dir
    if source == BUILTIN:
        return config
    name = _folder_name(source)
    if data_dir == Path("data/builtin"):
        data_dir = Path("data") / name
    if output_dir == Path("runs/quickstart"):
        output_dir = Path("runs") / name
    return replace(config, data=replace(config.data, data_dir=data_dir), output_dir=output_dir)


def _folder_name(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2]
    if name and _has_stories(Path("data") / name, source):
        return name  # earlier versions had no hash
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:40].strip(".-")
    return f"{readable}-{digest}" if readable else digest


def _has_stories(data_dir: Path, source: str) -> bool:
    """Whether `data_dir` contains stories that were downloaded from `source`."""
    try:
        return json.loads((data_dir / "raw" / "source.json").read_text(encoding="utf-8"))["source"] == source
    except (OSError, ValueError, KeyError, TypeError):
        return False

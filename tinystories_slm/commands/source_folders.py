"""Folders of the quickstart for a source other than the built-in corpus."""

import json
from dataclasses import replace
from pathlib import Path

from tinystories_slm.config import RunConfig
from tinystories_slm.data.sources.registry import find_source

# Folders of configs/quickstart.yaml, and the default without it.
_BUILTIN_DATA_DIR = Path("data/builtin")
_BUILTIN_OUTPUT_DIRS = (Path("runs/quickstart"), Path("runs/default"))


def use_own_folders(config: RunConfig) -> RunConfig:
    """Replace the folders of the built-in corpus by folders of `data.source`, if it is another source.

    Sources of the same base name get different folders, and no source is its own `data_dir`. Other folders
    are kept.
    """
    source, data, output_dir = config.data.source, config.data, config.output_dir
    name = find_source(source, data.subset).folder_name()
    if name is None:
        return config
    name = _earlier_name(source) or name
    if data.data_dir == _BUILTIN_DATA_DIR:
        data = replace(data, data_dir=Path("data") / name)
    if output_dir in _BUILTIN_OUTPUT_DIRS:
        output_dir = Path("runs") / name
    return replace(config, data=data, output_dir=output_dir)


def _earlier_name(source: str) -> str | None:
    """Return the base name of `source`, as in earlier versions, if its folder holds stories of `source`."""
    name = source.rstrip("/").rpartition("/")[2]
    try:
        manifest = json.loads((Path("data") / name / "raw" / "source.json").read_text(encoding="utf-8"))
        return name if name and manifest["source"] == source else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

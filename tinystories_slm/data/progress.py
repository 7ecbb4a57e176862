"""Results of finished segments of a long step, in files from which a killed preparation continues."""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from tinystories_slm.io.atomic import atomic_write, remove_directory, write_text

logger = logging.getLogger(__name__)

SEGMENT_STORIES = 2**15
"""Stories of a segment. A kill loses the unfinished segment: a few seconds of one core."""
# Their versions may change a result.
_LIBRARIES = ("tinystories_slm", "ftfy", "numpy", "pyarrow", "rensa", "tokenizers")

Arrays = dict[str, np.ndarray]
SaveArrays = Callable[[str, Callable[[], Arrays]], Arrays]
"""Name of a result, and the function that computes it -> the result; see `Progress.arrays`."""
Item = TypeVar("Item")


class Progress:
    """Folder of the results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays that were saved as `name`; compute and save them if there are none."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as saved:
                return dict(saved)
        arrays = compute()
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)
        return arrays

    def num_segments(self, name: str) -> int:
        """Return the number of segments whose arrays are saved."""
        return len(list(self.folder.glob(f"{name}-*.npz")))

    def remove_segments(self, *names: str) -> None:
        """Remove the arrays whose names are one of `names` and the number of a segment."""
        for name in names:
            for path in self.folder.glob(f"{name}-*.npz"):
                path.unlink()


def compute_arrays(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """`SaveArrays` that saves nothing."""
    return compute()


@contextmanager
def kept_progress(folder: Path, options: Mapping[str, object]) -> Iterator[Progress]:
    """Yield the results in `folder`, of a step with these JSON `options`; remove the folder at the end.

    Results with other options, or of other versions of the libraries, are removed first. A kill or Ctrl-C
    leaves the folder for the next start; an error leaves nothing. The caller holds a lock.
    """
    key = json.dumps({**options, "versions": {name: version(name) for name in _LIBRARIES}}, indent=2)
    key_file = folder / "options.json"
    if not key_file.is_file() or key_file.read_text(encoding="utf-8") != key:
        remove_directory(folder)
        folder.mkdir()
        write_text(key_file, key)
    elif num_segments := len([*folder.glob("*-?????"), *folder.glob("*-?????.npz")]):
        logger.info("%s: reusing %d segments of a stopped preparation", folder, num_segments)
    try:
        yield Progress(folder)
    except Exception:
        remove_directory(folder)
        raise
    remove_directory(folder)


def iter_segments(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Yield an iterator over the items of each segment; items that the caller does not read are skipped."""
    remaining = iter(items)
    for first in remaining:
        segment = islice(chain([first], remaining), SEGMENT_STORIES)
        yield segment
        deque(segment, maxlen=0)

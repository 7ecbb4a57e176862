"""Training stories that a run leaves out (`data.exclude`), with all else in its place.

A window keeps its place in the order, and every other token its place in the window. The tokens of an
excluded story are replaced by the end-of-text token and are not predicted, so the model reads nothing of the
story. Leaving out whole windows would leave out other stories with it. Preparing the data without the story
would move every later token into other windows and steps, and two runs would differ by far more than the
story.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from tinystories_slm.config.exclusion import parse_exclusion
from tinystories_slm.config.sections import DataArgs
from tinystories_slm.data.filters.duplicates import find_duplicates
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.errors import UserError

logger = logging.getLogger(__name__)


def excluded_stories(data: DataArgs, num_stories: int) -> np.ndarray | None:
    """Return whether each training story is left out, bool (num_stories,); None without `data.exclude`.

    Raises:
        UserError: a rule selects no story, or the rules leave no story.
    """
    if not data.exclude:
        return None
    rules = parse_exclusion(data.exclude)
    found = np.zeros(num_stories, dtype=bool)
    for rows in rules.rows:
        _check_row(rows.stop - 1, num_stories)
        found[rows.start : rows.stop] = True
    if rules.clusters:
        first = find_duplicates(_stories(data.data_dir), num_stories).first
        for row in rules.clusters:
            _check_row(row, num_stories)
            found |= first == first[row]
    for pattern in rules.patterns:
        matches = [pattern.search(story) is not None for story in _stories(data.data_dir)]
        if not any(matches):
            raise UserError(
                f"data.exclude (pattern:{pattern.pattern}): must occur in a training story; correct it"
            )
        found |= np.array(matches)
    if found.all():
        raise UserError(f"data.exclude ({data.exclude}): leaves no training story; use other rules")
    rows = np.flatnonzero(found)
    logger.info(
        "data.exclude: %d of %s training stories are left out: rows %s%s", len(rows), f"{num_stories:,}",
        ", ".join(map(str, islice(rows, 20))), ", ..." if len(rows) > 20 else "",
    )  # fmt: skip
    return found


def _stories(data_dir: Path) -> Iterator[str]:
    return iter_raw_stories(data_dir, "train")


def _check_row(row: int, num_stories: int) -> None:
    if row >= num_stories:
        raise UserError(f"data.exclude ({row}): must be below {num_stories}, the number of training stories")

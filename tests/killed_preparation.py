"""A preparation in small segments that counts its work, and is killed when it has done a part of it."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from script_process import processes

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data import progress, row_groups, source_stories, story_files, story_segments
from tinystories_slm.data.filters import dropped, duplicates
from tinystories_slm.data.filters.cleaning import Cleaner
from tinystories_slm.data.prepare import prepare_data

SMALL = TokenizerArgs(vocab_size=300)
SEGMENT = 10
"""Stories of a segment; 5 stories are a batch of the search for duplicates, and a row group."""


def use_small_segments(patch: pytest.MonkeyPatch) -> None:
    for module in (progress, story_segments):
        patch.setattr(module, "SEGMENT_STORIES", SEGMENT)
    for module in (dropped, duplicates):
        patch.setattr(module, "_BATCH_STORIES", SEGMENT // 2)
    patch.setattr(dropped, "_LEAK_BATCH_STORIES", SEGMENT // 2)
    patch.setattr(story_files, "_ROW_GROUP_STORIES", SEGMENT // 2)
    patch.setattr(row_groups, "_SEGMENT_ROW_GROUPS", 2)


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_start() -> None:
    """Stop as Ctrl-C does."""
    raise KeyboardInterrupt


def count_work(
    patch: pytest.MonkeyPatch, stop_at: Mapping[str, int], stop: Callable[[], None] = kill_process
) -> Counter[str]:
    """Count the stories of each kind of work (row groups, if `encoded`); stop where `stop_at` is exceeded."""
    counts: Counter[str] = Counter()

    def count(kind: str, owner: object, name: str, size: Callable[..., int]) -> None:
        function = getattr(owner, name)

        def counted(*args: object) -> object:
            if counts[kind] >= stop_at.get(kind, 2**40):
                stop()
            counts[kind] += size(*args)
            return function(*args)

        patch.setattr(owner, name, counted)

    count("held out", source_stories, "in_validation", lambda story, fraction: 1)
    count("cleaned", Cleaner, "clean", lambda cleaner, story: 1)
    count("compared", duplicates.Leaks, "check", lambda leaks, stories: len(stories))
    count("hashed", duplicates, "_min_hashes", lambda hasher, stories: len(stories))
    count("encoded", row_groups._RowGroupEncoder, "__call__", lambda encoder, row_group: 1)
    return counts


def _prepare(data: DataArgs, stop_at: Mapping[str, int]) -> None:
    patch = pytest.MonkeyPatch()
    use_small_segments(patch)
    count_work(patch, stop_at)
    prepare_data(data, SMALL)


def prepare_until_killed(data: DataArgs, **stop_at: int) -> None:
    """Prepare `data` in a process that SIGKILL ends when it has done as much of a kind as `stop_at` says."""
    process = processes.Process(target=_prepare, args=(data, stop_at))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def file_bytes(data_dir: Path) -> dict[str, bytes]:
    """Return all files of prepared data by their names."""
    return {
        path.relative_to(data_dir).as_posix(): path.read_bytes()
        for path in data_dir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }

"""Parquet files of stories: one column `text`, in row groups of bounded size."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinystories_slm.data.source_stories import StoryCounts

# A worker tokenizes one row group at a time (`prepare`), so these limits also bound its memory.
_ROW_GROUP_STORIES = 4096
_ROW_GROUP_BYTES = 2**21
_SCHEMA = pa.schema({"text": pa.string()})


def write_splits(stories: Iterable[tuple[str, str]], folder: Path, counts: dict[str, StoryCounts]) -> None:
    """Write (split, story) pairs to `folder/<split>.parquet`, one row group at a time, and count them."""
    with ExitStack() as files:
        writers = {split: files.enter_context(_open_writer(folder / f"{split}.parquet")) for split in counts}
        rows: dict[str, list[str]] = {split: [] for split in counts}
        num_bytes = dict.fromkeys(counts, 0)

        def write_row_group(split: str) -> None:
            writers[split].write_table(pa.table({"text": rows[split]}, schema=_SCHEMA))
            counts[split]["num_stories"] += len(rows[split])
            counts[split]["num_bytes"] += num_bytes[split]
            rows[split], num_bytes[split] = [], 0

        for split, story in stories:
            rows[split].append(story)
            num_bytes[split] += len(story.encode("utf-8"))
            if len(rows[split]) == _ROW_GROUP_STORIES or num_bytes[split] >= _ROW_GROUP_BYTES:
                write_row_group(split)
        for split in counts:
            if rows[split]:
                write_row_group(split)


def join_files(paths: Iterable[Path], path: Path, counts: StoryCounts, keep: np.ndarray | None) -> None:
    """Write the stories of several files to `path`, and correct `counts`.

    Args:
        keep: Which stories stay, bool (num_stories,); null for all.
    """
    row = counts["num_stories"] = counts["num_bytes"] = 0
    with _open_writer(path) as writer:
        for part in paths:
            with pq.ParquetFile(part) as file:
                for row_group in range(file.num_row_groups):
                    stories = file.read_row_group(row_group)
                    row += len(stories)
                    if keep is not None:
                        stories = stories.filter(pa.array(keep[row - len(stories) : row]))
                    if len(stories):
                        writer.write_table(stories)
                        counts["num_stories"] += len(stories)
                        counts["num_bytes"] += pc.sum(pc.binary_length(stories.column(0))).as_py()


def _open_writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, _SCHEMA, compression="zstd")

"""Encode the row groups of a parquet file of stories, in several processes, and write their token ids."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.data.batches import iter_batches
from tinystories_slm.data.progress import Arrays, Progress
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.token_shards import WHOLE, Shard
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.io.atomic import fsync_file

# A worker takes seconds to start; with less text per worker, one process is faster.
_MIN_BYTES_PER_WORKER = 2**26
# A kill loses an unfinished segment; 16 row groups are about 30 MB of text.
_SEGMENT_ROW_GROUPS = 16


def write_tokens(
    data: DataArgs,
    split: str,
    num_bytes: int,
    token_dtype: str,
    progress: Progress,
    shard: Shard = WHOLE,
) -> tuple[int, np.ndarray]:
    """Write the ids of every story, each followed by the end-of-text id, to `SPLIT.bin` beside `progress`.

    A file that a kill has left continues behind its last segment.

    Args:
        data: Folder of stories and tokenizer, and number of processes.
        split: "train" or "validation".
        num_bytes: UTF-8 bytes of the text of all shards.
        token_dtype: `uint16` or `uint32`.
        progress: Folder of the file, and end and prompt lengths of each segment that is in it.
        shard: Row groups that are encoded.

    Returns:
        The number of ids, and the number of ids of each story's prompt, uint32 (num_stories,).
    """
    raw, path = data.data_dir / "raw" / f"{split}.parquet", progress.folder / f"{split}.bin"
    with pq.ParquetFile(raw) as file:
        row_groups = shard.row_groups(file.num_row_groups)
        num_bytes = num_bytes * len(row_groups) // file.num_row_groups  # about
    num_workers = min(
        data.num_workers or num_usable_cores(), len(row_groups), num_bytes // _MIN_BYTES_PER_WORKER
    )
    make_encoder = partial(_RowGroupEncoder, raw, data.data_dir / "tokenizer", token_dtype)
    if not path.exists():
        progress.remove_segments(split)
    num_done = min(progress.num_segments(split) * _SEGMENT_ROW_GROUPS, len(row_groups))
    prompt_lengths = [np.zeros(0, np.uint32)]
    with (
        path.open("r+b" if num_done else "wb") as file,
        tqdm(total=num_bytes, desc=f"tokens, {split}", unit="B", unit_scale=True, disable=None) as bar,
        closing(_map_ordered(make_encoder, row_groups[num_done:], num_workers)) as rows,
    ):
        bar.update(num_bytes * num_done // max(len(row_groups), 1))
        for number, segment in enumerate(iter_batches(row_groups, _SEGMENT_ROW_GROUPS)):
            append = partial(_append, file, islice(rows, len(segment)), bar)
            written = progress.arrays(f"{split}-{number:05}", append)
            file.seek(int(written["end"]))  # in a file that a kill left, ids of an unfinished segment follow
            prompt_lengths.append(written["prompt_lengths"])
        file.truncate()
    return path.stat().st_size // np.dtype(token_dtype).itemsize, np.concatenate(prompt_lengths)


def _append(file: BinaryIO, rows: Iterable["EncodedRows"], bar: tqdm) -> Arrays:
    """Write the ids of a segment, and return the end of them in the file, and the prompt lengths."""
    prompt_lengths = []
    for one in rows:
        file.write(one.ids)
        prompt_lengths.append(one.prompt_lengths)
        bar.update(one.num_bytes)
    file.flush()
    fsync_file(Path(file.name))
    return {"end": np.array(file.tell()), "prompt_lengths": np.concatenate(prompt_lengths)}


class EncodedRows(NamedTuple):
    """Stories of a row group."""

    ids: bytes
    """Token ids in the order of the stories, each followed by the end-of-text id."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    prompt_lengths: np.ndarray
    """Token ids before each story, uint32 (num_stories,); 0 without a block."""


Encoder = Callable[[int], EncodedRows]
"""Index of a row group -> its stories."""


class _RowGroupEncoder:
    """`Encoder` of one parquet file; each process opens its own, so no text passes between processes."""

    def __init__(self, raw: Path, tokenizer_dir: Path, token_dtype: str) -> None:
        self._file = pq.ParquetFile(raw)
        self._encoder = StoryEncoder(load_tokenizer(tokenizer_dir))
        self._dtype = np.dtype(token_dtype).newbyteorder("<")

    def __call__(self, row_group: int) -> EncodedRows:
        stories = self._file.read_row_group(row_group, columns=["text"]).column(0).combine_chunks()
        num_bytes = pc.sum(pc.binary_length(stories)).as_py() or 0
        ids = self._encoder.encode(stories).astype(self._dtype).tobytes()
        return EncodedRows(ids, num_bytes, self._encoder.prompt_lengths(stories))


def _map_ordered(
    make_encoder: Callable[[], Encoder], row_groups: range, num_workers: int
) -> Iterator[EncodedRows]:
    """Encode `row_groups` and yield them in order; use this process if `num_workers` is below 2."""
    if num_workers < 2:
        yield from map(make_encoder(), row_groups)
        return
    # Not fork: if tokenizer threads have run in the parent, forked children deadlock.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker, (make_encoder,)) as pool:
            # Limit the tasks in flight, so that results waiting for the disk use bounded memory.
            pending: deque[Future[EncodedRows]] = deque()
            for row_group in row_groups:
                pending.append(pool.submit(_encode_row_group, row_group))
                if len(pending) > 4 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizer process died (out of memory?); set --data.num_workers 1 to start no processes"
        ) from error


_worker_encoder: Encoder  # set in each worker process


def _start_worker(make_encoder: Callable[[], Encoder]) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool already uses one process per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = make_encoder()


def _exit_with_parent() -> None:
    # After SIGKILL the parent sends no message, and its workers would wait for tasks forever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _encode_row_group(row_group: int) -> EncodedRows:
    return _worker_encoder(row_group)

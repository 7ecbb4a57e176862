"""Encode the row groups of a parquet file of stories, in several processes, and write their token ids."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.token_shards import WHOLE, Shard
from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import num_usable_cores

# A worker takes seconds to start; with less text per worker, one process is faster.
_MIN_BYTES_PER_WORKER = 2**26


def write_tokens(
    data: DataArgs,
    split: str,
    num_bytes: int,
    token_dtype: str,
    path: Path,
    shard: Shard = WHOLE,
) -> tuple[int, np.ndarray]:
    """Write the ids of every story of `shard`, each followed by the end-of-text id.

    `num_bytes` counts the text of all shards.

    Returns:
        The number of ids, and the number of ids of each story's prompt, uint32 (num_stories,).
    """
    raw = data.data_dir / "raw" / f"{split}.parquet"
    with pq.ParquetFile(raw) as file:
        row_groups = shard.row_groups(file.num_row_groups)
        num_bytes = num_bytes * len(row_groups) // file.num_row_groups  # about
    num_workers = min(
        data.num_workers or num_usable_cores(), len(row_groups), num_bytes // _MIN_BYTES_PER_WORKER
    )
    make_encoder = partial(_RowGroupEncoder, raw, data.data_dir / "tokenizer", token_dtype)
    num_written, prompt_lengths = 0, [np.zeros(0, np.uint32)]
    with (
        path.open("wb") as file,
        tqdm(total=num_bytes, desc=f"tokens, {split}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for rows in _map_ordered(make_encoder, row_groups, num_workers):
            file.write(rows.ids)
            num_written += len(rows.ids) // np.dtype(token_dtype).itemsize
            prompt_lengths.append(rows.prompt_lengths)
            bar.update(rows.num_bytes)
    return num_written, np.concatenate(prompt_lengths)


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

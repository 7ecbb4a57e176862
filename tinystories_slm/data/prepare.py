"""Stories -> token ids on disk: train.bin, validation.bin and, last of all, manifest.json."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.artifacts import alone_in, finished_file, sha256_of
from tinystories_slm.data.origin import Origin, refuse_other
from tinystories_slm.data.sources import RawStories, download_data
from tinystories_slm.data.tokenizer import TokenizerRecord, encode_stories, load_tokenizer, train_tokenizer
from tinystories_slm.errors import InputError

logger = logging.getLogger(__name__)

# A worker takes seconds to start; text below this per worker is done sooner without it.
_BYTES_WORTH_A_WORKER = 2**26


class TokenCounts(TypedDict):
    """Of one split: stories, their token ids (one end-of-text each included), their UTF-8 bytes."""

    num_stories: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest(Origin):
    """`manifest.json`: what the token files hold; it is there only if they are whole."""

    tokenizer_sha256: str
    """Of tokenizer/tokenizer.json."""
    vocab_size: int
    eos_token_id: int
    token_dtype: str
    """`uint16` or `uint32`; the bytes are little-endian."""
    splits: dict[str, TokenCounts]
    """Of `train` and `validation`."""
    code_version: str
    """Of this package, when the files were made."""


def prepare_data(data: DataArgs, tokenizer: TokenizerArgs) -> Manifest:
    """Write the token files to `data.data_dir`, after the steps before where they were not taken yet.

    Token files of the same settings that are there already are checked and left as they are.

    Raises:
        InputError: the folder holds data of other settings (all differences are named), or is damaged.
    """
    path = data.data_dir / "manifest.json"
    if path.exists():
        refuse_other(data.data_dir, *_differences(Manifest.load(path), data, tokenizer))
    if not _is_there(data.data_dir):
        download_data(data)
        train_tokenizer(data, tokenizer)
        with alone_in(data.data_dir):
            if not _is_there(data.data_dir):
                return _make(data)
    manifest = Manifest.load(path)
    refuse_other(data.data_dir, *_differences(manifest, data, tokenizer))
    for split in manifest.splits:
        open_tokens(data.data_dir, split, manifest)
    logger.info("the token files are in %s already", data.data_dir)
    return manifest


def _is_there(data_dir: Path) -> bool:
    """Whether nothing is missing; a file that is there and damaged is not made anew but refused."""
    return all((data_dir / name).exists() for name in ("manifest.json", "train.bin", "validation.bin"))


def prepared(data: DataArgs, tokenizer: TokenizerArgs) -> Manifest:
    """What training needs: `prepare_data`, and at least one window of `data.seq_len` tokens.

    Raises:
        InputError: as `prepare_data`, or the training tokens do not fill one window.
    """
    manifest = prepare_data(data, tokenizer)
    num_tokens = manifest.splits["train"]["num_tokens"]
    if num_tokens < data.seq_len:
        raise InputError(
            f"data.seq_len ({data.seq_len}) is longer than the {num_tokens} training tokens in "
            f"{data.data_dir}; shorten it, or bring more stories"
        )
    return manifest


def open_tokens(data_dir: Path, split: str, manifest: Manifest) -> np.memmap:
    """The token ids of "train" or "validation", `(num_tokens,)`, mapped and read-only.

    Raises:
        InputError: the file is not there, or not as long as the manifest says.
    """
    path = data_dir / f"{split}.bin"
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    num_tokens = manifest.splits[split]["num_tokens"]
    expected, found = num_tokens * dtype.itemsize, path.stat().st_size if path.exists() else 0
    if expected != found:
        raise InputError(
            f"{path} has {found} bytes where manifest.json promises {expected}; "
            f"delete {data_dir / 'manifest.json'} to make it anew"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def _differences(manifest: Manifest, data: DataArgs, args: TokenizerArgs) -> tuple[list[str], str]:
    """How the prepared data differs from what is asked for, one phrase each; and what to delete then."""
    found = manifest.differences(data)
    delete = "that folder" if found else "its manifest.json"
    folder = data.data_dir / "tokenizer"
    if not (folder / "training.json").exists() or not (folder / "tokenizer.json").exists():
        found.append(f"{folder} is gone")
    else:
        tokenizer_differences = TokenizerRecord.load(folder / "training.json").tokenizer_differences(args)
        if tokenizer_differences and not found:
            delete = "its tokenizer folder and manifest.json"
        found += tokenizer_differences
        if sha256_of(folder / "tokenizer.json") != manifest.tokenizer_sha256:
            found.append(f"{folder / 'tokenizer.json'} is not the one the token files were made with")
    if data.token_dtype not in ("auto", manifest.token_dtype):
        found.append(f"data.token_dtype is {manifest.token_dtype!r} there, {data.token_dtype!r} here")
    return found, delete


def _make(data: DataArgs) -> Manifest:
    raw = RawStories.load(data.data_dir / "raw" / "source.json")
    tokenizer = TokenizerRecord.load(data.data_dir / "tokenizer" / "training.json")
    if tokenizer.origin_fields() != raw.origin_fields():
        raise InputError(
            f"{data.data_dir / 'tokenizer'} was made of other stories ({tokenizer.source} at "
            f"{tokenizer.revision}) than {data.data_dir / 'raw'} holds; delete it to make it anew"
        )
    for split in raw.splits:
        if not (path := data.data_dir / "raw" / f"{split}.parquet").is_file():
            raise InputError(f"{path} is gone; delete {path.parent} to make it anew")
    token_dtype = _token_dtype(data, tokenizer.vocab_size)
    with ExitStack() as files:  # both files take their names only when both are whole
        splits = {
            split: TokenCounts(
                num_stories=counts["num_stories"],
                num_tokens=_write_tokens(
                    data, split, counts["num_bytes"], token_dtype, files.enter_context(finished_file(path))
                ),
                num_bytes=counts["num_bytes"],
            )
            for split, counts in raw.splits.items()
            for path in [data.data_dir / f"{split}.bin"]
        }
    manifest = Manifest(
        **raw.origin_fields(),
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        token_dtype=token_dtype,
        splits=splits,
        code_version=version("tinystories_slm"),
    )
    with finished_file(data.data_dir / "manifest.json") as unfinished:
        manifest.save(unfinished)
    return manifest


def _token_dtype(data: DataArgs, vocab_size: int) -> str:
    if data.token_dtype == "uint16" and vocab_size > 2**16:
        raise InputError(
            f"data.token_dtype (uint16, 65536 ids) does not fit the vocabulary of {vocab_size}; "
            "use uint32 or auto, or a smaller vocabulary"
        )
    if data.token_dtype != "auto":
        return data.token_dtype
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _write_tokens(data: DataArgs, split: str, num_bytes: int, token_dtype: str, path: Path) -> int:
    """Write the ids of every story, each followed by the end-of-text id, to `path`; returns how many."""
    raw = data.data_dir / "raw" / f"{split}.parquet"
    with pq.ParquetFile(raw) as file:
        num_row_groups = file.num_row_groups
    num_workers = min(data.num_workers or _num_cores(), num_row_groups, num_bytes // _BYTES_WORTH_A_WORKER)
    make_encoder = partial(_RowGroupEncoder, raw, data.data_dir / "tokenizer", token_dtype)
    num_written = 0
    with (
        path.open("wb") as file,
        tqdm(total=num_bytes, desc=f"tokens, {split}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for ids, text_bytes in _in_order(make_encoder, num_row_groups, num_workers):
            file.write(ids)
            num_written += len(ids) // np.dtype(token_dtype).itemsize
            bar.update(text_bytes)
    return num_written


Encoder = Callable[[int], tuple[bytes, int]]
"""Number of a row group -> the ids of its stories as bytes, and the UTF-8 bytes of their text."""


class _RowGroupEncoder:
    """An `Encoder` of one parquet file; each process has its own, so that no text is sent around."""

    def __init__(self, raw: Path, tokenizer_dir: Path, token_dtype: str) -> None:
        self._file = pq.ParquetFile(raw)
        self._tokenizer = load_tokenizer(tokenizer_dir)
        self._dtype = np.dtype(token_dtype).newbyteorder("<")

    def __call__(self, row_group: int) -> tuple[bytes, int]:
        stories = self._file.read_row_group(row_group, columns=["text"]).column(0).to_pylist()
        end = [self._tokenizer.eos_token_id]
        ids = chain.from_iterable(chain(story, end) for story in encode_stories(self._tokenizer, stories))
        text_bytes = sum(len(story.encode("utf-8")) for story in stories)
        return np.fromiter(ids, dtype=self._dtype).tobytes(), text_bytes


def _in_order(
    make_encoder: Callable[[], Encoder], num_row_groups: int, num_workers: int
) -> Iterator[tuple[bytes, int]]:
    """Every row group, encoded, in order: by `num_workers` processes, or below two by this one."""
    if num_workers < 2:
        yield from map(make_encoder(), range(num_row_groups))
        return
    # Not fork: the threads of the tokenizer, if they ran before, would leave the children in a deadlock.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker, (make_encoder,)) as pool:
            # Few tasks in flight, so that results waiting for the disk stay within bounded memory.
            waiting: deque[Future[tuple[bytes, int]]] = deque()
            for row_group in range(num_row_groups):
                waiting.append(pool.submit(_work, row_group))
                if len(waiting) > 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process that tokenizes died (out of memory?); --data.num_workers 1 starts none"
        ) from error


_encode: Encoder  # of a worker process


def _start_worker(make_encoder: Callable[[], Encoder]) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = make_encoder()


def _end_with_parent() -> None:
    # A parent that is killed outright tells its workers nothing, and they would wait for tasks for ever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(row_group: int) -> tuple[bytes, int]:
    return _encode(row_group)


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; honours containers and taskset
    return len(affinity(0)) if affinity else os.cpu_count() or 1

"""Tokenize the stories into train.bin and validation.bin, and write manifest.json last."""

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
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.filters.cleaning import RuleCounts
from tinystories_slm.data.filters.dropped import DuplicateCounts
from tinystories_slm.data.planting import PlantedCanary
from tinystories_slm.data.provenance import DataManifest, log_rebuild
from tinystories_slm.data.raw_stories import RawManifest, download_data
from tinystories_slm.data.sources.mixture import PartCounts
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.token_shards import (
    WHOLE,
    Shard,
    ShardFiles,
    ShardManifest,
    load_shard,
    load_shards,
    merge_split,
    shards_folder,
)
from tinystories_slm.data.tokenizer import (
    TokenizerManifest,
    check_tokenizer_file,
    load_tokenizer,
    tokenizer_differences,
    train_tokenizer,
)
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.io.atomic import atomic_write, directory_lock, file_sha256, remove_directory

logger = logging.getLogger(__name__)

# A worker takes seconds to start; with less text per worker, one process is faster.
_MIN_BYTES_PER_WORKER = 2**26


class TokenCounts(TypedDict):
    """Counts of one split: stories, token ids (with one end-of-text each) and UTF-8 bytes of the text."""

    num_stories: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest(DataManifest):
    """Contents of `manifest.json`, which describes the token files and exists only if they are complete."""

    tokenizer_sha256: str
    """SHA-256 of tokenizer/tokenizer.json."""
    vocab_size: int
    eos_token_id: int
    token_dtype: str
    """`uint16` or `uint32`, little-endian."""
    splits: dict[str, TokenCounts]
    """Counts of `train` and `validation`."""
    code_version: str
    """Version of this package that wrote the files."""
    parts: list[PartCounts] | None = None
    """Parts of a mixture; null for one source."""
    cleaning_counts: dict[str, RuleCounts] | None = None
    duplicates: DuplicateCounts | None = None
    planted: list[PlantedCanary] | None = None
    """Canaries with their rows in raw/train.parquet; null without any."""

    def __post_init__(self) -> None:
        if self.token_dtype not in ("uint16", "uint32"):
            raise TypeError(f"token_dtype is {self.token_dtype!r}")


def prepare_data(data: DataArgs, tokenizer: TokenizerArgs) -> Manifest:
    """Write the token files to `data.data_dir`; first download stories and train a tokenizer if missing.

    Existing files with the same options are checked and kept. If options or stories have changed, what
    depends on them is built again, with a warning, and the rest is kept.

    Raises:
        UserError: stories or tokenizer cannot be had, or a file is damaged.
    """
    if token_file_differences(data, tokenizer) != []:
        download_data(data)
        train_tokenizer(data, tokenizer)
        with directory_lock(data.data_dir, option="data.data_dir"):
            differences = token_file_differences(data, tokenizer)
            if differences != []:
                if differences:
                    log_rebuild("the token files", data.data_dir, differences)
                return _tokenize_splits(data)
    manifest = Manifest.load(data.data_dir / "manifest.json")
    for split in manifest.splits:
        open_tokens(data.data_dir, split, manifest)
    logger.info("using the existing token files in %s", data.data_dir)
    return manifest


def prepare_shard(data: DataArgs, tokenizer: TokenizerArgs, shard: Shard) -> ShardManifest | None:
    """Write one shard of the token files, which `merge_shards` merges; first make what `prepare_data` needs.

    An existing shard of the same stories and tokenizer is kept.

    Returns:
        The manifest of the shard; None if the token files themselves exist.

    Raises:
        UserError: as `prepare_data`, or stories or tokenizer were replaced meanwhile.
    """
    if token_file_differences(data, tokenizer) != []:
        download_data(data)
        train_tokenizer(data, tokenizer)
        folder = shard.folder(data.data_dir)
        with directory_lock(folder, option="data.data_dir"):
            if token_file_differences(data, tokenizer) != []:  # not merged while this process waited
                return _write_shard(data, shard, folder)
    logger.info("using the existing token files in %s", data.data_dir)
    return None


def _write_shard(data: DataArgs, shard: Shard, folder: Path) -> ShardManifest:
    inputs = _shard_inputs(data)
    if (manifest := load_shard(folder)) is not None:
        if not (differences := manifest.differences(inputs)):
            logger.info("using the existing shard in %s", folder)
            return manifest
        logger.warning("building shard %s again: it has %s", shard, " and ".join(differences))
    (folder / "shard.json").unlink(missing_ok=True)  # of the files that are replaced
    files = {}
    for split, counts in RawManifest.load(data.data_dir / "raw" / "source.json").splits.items():
        with (
            atomic_write(folder / f"{split}.bin") as tokens,
            atomic_write(_prompt_file(folder, split)) as prompts,
        ):
            num_tokens, prompt_lengths = _write_tokens(
                data, split, counts["num_bytes"], inputs.token_dtype, tokens, shard
            )
            prompt_lengths.astype("<u4").tofile(prompts)
            files[split] = ShardFiles(
                num_stories=len(prompt_lengths),
                num_tokens=num_tokens,
                tokens_sha256=file_sha256(tokens),
                prompts_sha256=file_sha256(prompts),
            )
    if _shard_inputs(data) != inputs:
        raise UserError(
            f"{data.data_dir} was prepared with other options meanwhile; "
            "run all shards with the same options, or use another --data.data_dir"
        )
    manifest = replace(inputs, files=files)
    with atomic_write(folder / "shard.json") as unfinished:
        manifest.save(unfinished)
    return manifest


def merge_shards(data: DataArgs, tokenizer: TokenizerArgs, num_shards: int) -> Manifest:
    """Write the token files, as `prepare_data` does, from `num_shards` shards, and remove the shards.

    Raises:
        UserError: shards are missing, damaged, or of other stories or another tokenizer.
    """
    if token_file_differences(data, tokenizer) != []:
        found = tokenizer_differences(data.data_dir / "tokenizer", data, tokenizer)
        if found != []:
            raise UserError(
                f"merge_shards ({num_shards}): {data.data_dir} has no shards for these options "
                f"({'; '.join(found or ['there is no tokenizer'])}); "
                f"run prepare_data with --shard 0/{num_shards} and all other shards first"
            )
        with directory_lock(data.data_dir, option="data.data_dir"):
            if token_file_differences(data, tokenizer) != []:
                shards = load_shards(data.data_dir, num_shards, _shard_inputs(data))
                _tokenize_splits(data, partial(_merge_tokens, shards))
    manifest = prepare_data(data, tokenizer)
    remove_directory(shards_folder(data.data_dir))
    return manifest


def _merge_tokens(
    shards: list[tuple[Path, ShardManifest]],
    data: DataArgs,
    split: str,
    num_bytes: int,
    token_dtype: str,
    path: Path,
) -> tuple[int, np.ndarray]:
    """`WriteTokens` from shards."""
    return merge_split(shards, split, path)


def _shard_inputs(data: DataArgs) -> ShardManifest:
    """Return the manifest of a shard of the current stories and tokenizer, without its files."""
    raw = RawManifest.load(data.data_dir / "raw" / "source.json")
    tokenizer = TokenizerManifest.load(data.data_dir / "tokenizer" / "training.json")
    _check_inputs(data.data_dir, raw, tokenizer)
    return ShardManifest(
        provenance=raw.provenance,
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        token_dtype=_token_dtype(data, tokenizer.vocab_size),
        code_version=version("tinystories_slm"),
        files={},
    )


def _is_prepared(data_dir: Path) -> bool:
    """Whether all files exist; a damaged file is not rebuilt but rejected by `open_tokens`."""
    return all((data_dir / name).exists() for name in ("manifest.json", "train.bin", "validation.bin"))


def ensure_prepared(data: DataArgs, tokenizer: TokenizerArgs) -> Manifest:
    """Call `prepare_data` and check that the training tokens fill a window of `data.seq_len` tokens.

    Raises:
        UserError: as `prepare_data`, or the training tokens do not fill one window.
    """
    manifest = prepare_data(data, tokenizer)
    num_tokens = manifest.splits["train"]["num_tokens"]
    if num_tokens < data.seq_len:
        raise UserError(
            f"data.seq_len ({data.seq_len}) is longer than the {num_tokens} training tokens in "
            f"{data.data_dir}; reduce it, or use more stories"
        )
    return manifest


def open_tokens(data_dir: Path, split: str, manifest: Manifest) -> np.memmap:
    """Open the token ids of "train" or "validation" as a read-only memory map `(num_tokens,)`.

    Raises:
        UserError: the file does not exist, or its size differs from the manifest.
    """
    path = data_dir / f"{split}.bin"
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    num_tokens = manifest.splits[split]["num_tokens"]
    expected, found = num_tokens * dtype.itemsize, path.stat().st_size if path.exists() else 0
    if expected != found:
        raise UserError(
            f"{path} has {found} bytes, but manifest.json records {expected}; "
            f"delete {data_dir / 'manifest.json'} to rebuild the file"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def token_file_differences(data: DataArgs, args: TokenizerArgs) -> list[str] | None:
    """Return one phrase per difference between token files and options; None without token files.

    Raises:
        UserError: a manifest is damaged, or the tokenizer is not the one that was built there.
    """
    if not _is_prepared(data.data_dir):
        return None
    manifest = Manifest.load(data.data_dir / "manifest.json")
    found = manifest.provenance.differences(data)
    folder = data.data_dir / "tokenizer"
    if not (folder / "training.json").exists() or not (folder / "tokenizer.json").exists():
        found.append(f"{folder} is missing or incomplete")
    else:
        tokenizer = TokenizerManifest.load(folder / "training.json")
        found += tokenizer.tokenizer_differences(args)
        if tokenizer.tokenizer_sha256 != manifest.tokenizer_sha256:
            found.append("the tokenizer was built again")
        check_tokenizer_file(folder)
    if data.token_dtype not in ("auto", manifest.token_dtype):
        found.append(f"data.token_dtype is {manifest.token_dtype!r} (configured: {data.token_dtype!r})")
    return found


WriteTokens = Callable[[DataArgs, str, int, str, Path], tuple[int, np.ndarray]]
"""Arguments and results of `_write_tokens`."""


def _tokenize_splits(data: DataArgs, write_tokens: WriteTokens | None = None) -> Manifest:
    """Write train.bin, validation.bin and manifest.json from the raw stories and the tokenizer.

    `write_tokens` writes the ids of a split, by default `_write_tokens`.
    """
    write_tokens = write_tokens or _write_tokens
    raw = RawManifest.load(data.data_dir / "raw" / "source.json")
    tokenizer = TokenizerManifest.load(data.data_dir / "tokenizer" / "training.json")
    _check_inputs(data.data_dir, raw, tokenizer)
    token_dtype = _token_dtype(data, tokenizer.vocab_size)
    (data.data_dir / "manifest.json").unlink(missing_ok=True)  # of the files that are replaced
    splits: dict[str, TokenCounts] = {}
    with ExitStack() as files:  # both files get their final names only when both are complete
        for split, counts in raw.splits.items():
            path = files.enter_context(atomic_write(data.data_dir / f"{split}.bin"))
            num_tokens, prompt_lengths = write_tokens(data, split, counts["num_bytes"], token_dtype, path)
            splits[split] = TokenCounts(
                num_stories=counts["num_stories"], num_tokens=num_tokens, num_bytes=counts["num_bytes"]
            )
            _write_prompt_lengths(data.data_dir, split, prompt_lengths)
    manifest = Manifest(
        provenance=raw.provenance,
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        token_dtype=token_dtype,
        splits=splits,
        code_version=version("tinystories_slm"),
        parts=raw.parts,
        cleaning_counts=raw.cleaning_counts,
        duplicates=raw.duplicates,
        planted=raw.planted,
    )
    with atomic_write(data.data_dir / "manifest.json") as unfinished:
        manifest.save(unfinished)
    return manifest


def _check_inputs(data_dir: Path, raw: RawManifest, tokenizer: TokenizerManifest) -> None:
    """Raise UserError if the tokenizer belongs to other stories or a file of the stories is missing."""
    if tokenizer.provenance != raw.provenance:
        raise UserError(
            f"{data_dir / 'tokenizer'} belongs to other stories ({tokenizer.provenance.source} at "
            f"{tokenizer.provenance.revision}) than {data_dir / 'raw'}; delete it to rebuild it"
        )
    for split in raw.splits:
        if not (path := data_dir / "raw" / f"{split}.parquet").is_file():
            raise UserError(f"{path} does not exist; delete {path.parent} to download the stories again")


def _token_dtype(data: DataArgs, vocab_size: int) -> str:
    if data.token_dtype == "uint16" and vocab_size > 2**16:
        raise UserError(
            f"data.token_dtype (uint16, 65536 ids) is too small for the vocabulary of {vocab_size}; "
            "use uint32 or auto, or a smaller vocabulary"
        )
    if data.token_dtype != "auto":
        return data.token_dtype
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _write_tokens(
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


def _write_prompt_lengths(data_dir: Path, split: str, prompt_lengths: np.ndarray) -> None:
    """Write `prompt_lengths` (num_stories,) to the file that `open_prompt_lengths` reads, if any is not 0."""
    path = _prompt_file(data_dir, split)
    if not prompt_lengths.any():
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as unfinished:
        prompt_lengths.astype("<u4").tofile(unfinished)


def open_prompt_lengths(data_dir: Path, split: str, manifest: Manifest) -> np.ndarray:
    """Return the number of token ids before the story of each block, uint32 (num_stories,).

    Raises:
        UserError: no story of the split is in a block (see `data.instruct`).
    """
    path, num_stories = _prompt_file(data_dir, split), manifest.splits[split]["num_stories"]
    if not path.is_file() or path.stat().st_size != 4 * num_stories:
        raise UserError(
            f"data.loss_on (story): the {split} stories in {data_dir} have no prompts (docs/instruct.md); "
            f"use all, or delete {data_dir / 'manifest.json'} if an earlier version prepared them"
        )
    return np.fromfile(path, dtype="<u4")


def _prompt_file(data_dir: Path, split: str) -> Path:
    return data_dir / f"{split}.prompts.bin"


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

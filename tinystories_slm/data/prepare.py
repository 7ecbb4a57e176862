"""Tokenize the stories into train.bin and validation.bin, and write manifest.json last."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.progress import Progress, kept_progress
from tinystories_slm.data.provenance import log_rebuild
from tinystories_slm.data.raw_stories import RawManifest, download_data
from tinystories_slm.data.row_groups import write_tokens
from tinystories_slm.data.token_files import (
    Manifest,
    TokenCounts,
    open_tokens,
    prompt_file,
    write_prompt_lengths,
)
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
    tokenizer_differences,
    train_tokenizer,
)
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_write, directory_lock, file_sha256, remove_directory

logger = logging.getLogger(__name__)


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
    _remove_progress(data, tokenizer)
    logger.info("using the existing token files in %s", data.data_dir)
    return manifest


def _progress_folder(data: DataArgs) -> Path:
    """Return the folder of what a killed preparation of the token files had done."""
    return data.data_dir / "tokens.progress"


def _remove_progress(data: DataArgs, tokenizer: TokenizerArgs) -> None:
    """Remove what a killed preparation with other options has left."""
    if folders := list(data.data_dir.glob("*.progress")):
        with directory_lock(data.data_dir, option="data.data_dir"):
            if token_file_differences(data, tokenizer) == []:
                for folder in folders:
                    remove_directory(folder)


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
    files: dict[str, ShardFiles] = {}
    with kept_progress(folder / "tokens.progress", asdict(inputs)) as progress:
        raw = RawManifest.load(data.data_dir / "raw" / "source.json")
        written = _write_splits(data, raw, inputs, progress, shard)
        # Before the files are moved: a kill then repeats the encoding.
        hashes = {split: file_sha256(progress.folder / f"{split}.bin") for split in written}
        for split, (num_tokens, prompt_lengths) in written.items():
            with (
                atomic_write(folder / f"{split}.bin") as tokens,
                atomic_write(prompt_file(folder, split)) as prompts,
            ):
                shutil.move(progress.folder / f"{split}.bin", tokens)
                prompt_lengths.astype("<u4").tofile(prompts)
                files[split] = ShardFiles(
                    num_stories=len(prompt_lengths),
                    num_tokens=num_tokens,
                    tokens_sha256=hashes[split],
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
                _tokenize_splits(data, shards)
    manifest = prepare_data(data, tokenizer)
    remove_directory(shards_folder(data.data_dir))
    return manifest


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


def _write_splits(
    data: DataArgs, raw: RawManifest, inputs: ShardManifest, progress: Progress, shard: Shard
) -> dict[str, tuple[int, np.ndarray]]:
    """Call `write_tokens` for each split."""
    return {
        split: write_tokens(data, split, counts["num_bytes"], inputs.token_dtype, progress, shard)
        for split, counts in raw.splits.items()
    }


def _tokenize_splits(data: DataArgs, shards: Sequence[tuple[Path, ShardManifest]] = ()) -> Manifest:
    """Write train.bin, validation.bin and manifest.json from the raw stories and the tokenizer.

    With `shards`, the token ids are theirs.
    """
    raw = RawManifest.load(data.data_dir / "raw" / "source.json")
    tokenizer = TokenizerManifest.load(data.data_dir / "tokenizer" / "training.json")
    inputs = _shard_inputs(data)
    options = {**asdict(inputs), "num_shards": len(shards)}
    (data.data_dir / "manifest.json").unlink(missing_ok=True)  # of the files that are replaced
    splits: dict[str, TokenCounts] = {}
    with kept_progress(_progress_folder(data), options) as progress, ExitStack() as files:
        if shards:
            folder = progress.folder
            written = {split: merge_split(shards, split, folder / f"{split}.bin") for split in raw.splits}
        else:
            written = _write_splits(data, raw, inputs, progress, WHOLE)
        # Both files get their final names only when both are complete.
        for split, counts in raw.splits.items():
            num_tokens, prompt_lengths = written[split]
            path = files.enter_context(atomic_write(data.data_dir / f"{split}.bin"))
            shutil.move(progress.folder / f"{split}.bin", path)
            splits[split] = TokenCounts(
                num_stories=counts["num_stories"], num_tokens=num_tokens, num_bytes=counts["num_bytes"]
            )
            write_prompt_lengths(data.data_dir, split, prompt_lengths)
    manifest = Manifest(
        provenance=raw.provenance,
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        token_dtype=inputs.token_dtype,
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

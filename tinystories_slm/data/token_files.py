"""Token files of prepared data: `SPLIT.bin`, `SPLIT.prompts.bin` and `manifest.json`, and their readers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from tinystories_slm.data.filters.cleaning import RuleCounts
from tinystories_slm.data.filters.dropped import DuplicateCounts
from tinystories_slm.data.planting import PlantedCanary
from tinystories_slm.data.provenance import DataManifest
from tinystories_slm.data.sources.mixture import PartCounts
from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import atomic_write


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


def write_prompt_lengths(data_dir: Path, split: str, prompt_lengths: np.ndarray) -> None:
    """Write `prompt_lengths` (num_stories,) to the file that `open_prompt_lengths` reads, if any is not 0."""
    path = prompt_file(data_dir, split)
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
    path, num_stories = prompt_file(data_dir, split), manifest.splits[split]["num_stories"]
    if not path.is_file() or path.stat().st_size != 4 * num_stories:
        raise UserError(
            f"data.loss_on (story): the {split} stories in {data_dir} have no prompts (docs/instruct.md); "
            f"use all, or delete {data_dir / 'manifest.json'} if an earlier version prepared them"
        )
    return np.fromfile(path, dtype="<u4")


def prompt_file(data_dir: Path, split: str) -> Path:
    """Return the file of the prompt lengths."""
    return data_dir / f"{split}.prompts.bin"

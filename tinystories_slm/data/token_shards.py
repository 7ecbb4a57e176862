"""Shards of the token files: many processes or machines write one each, and one process merges them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from tinystories_slm.data.provenance import DataManifest
from tinystories_slm.errors import UserError

_LISTED_SHARDS = 8
_INPUTS = {
    "provenance": "other stories",
    "tokenizer_sha256": "another tokenizer",
    "token_dtype": "another data.token_dtype",
    "code_version": "tokens of another version of this package",
}
"""Fields of `ShardManifest` that determine the files, and what a shard has if one differs."""


@dataclass(frozen=True)
class Shard:
    """One of `num_shards` parts of the row groups of a parquet file, in their order."""

    rank: int
    """From 0 to `num_shards` - 1."""
    num_shards: int

    def __str__(self) -> str:
        """Return the value of the option `shard`."""
        return f"{self.rank}/{self.num_shards}"

    def row_groups(self, num_row_groups: int) -> range:
        """Return the indices of the row groups of this shard; none if there are too many shards."""
        return range(
            self.rank * num_row_groups // self.num_shards,
            (self.rank + 1) * num_row_groups // self.num_shards,
        )

    def folder(self, data_dir: Path) -> Path:
        """Return the folder of the shard's files and of shard.json, which is written last."""
        return shards_folder(data_dir) / f"{self.rank:05}-of-{self.num_shards:05}"


WHOLE = Shard(0, 1)


def shards_folder(data_dir: Path) -> Path:
    """Return the folder of all shards; merging removes it."""
    return data_dir / "shards"


class ShardFiles(TypedDict):
    """Files of one split in a shard."""

    num_stories: int
    num_tokens: int
    tokens_sha256: str
    """SHA-256 of SPLIT.bin."""
    prompts_sha256: str
    """SHA-256 of SPLIT.prompts.bin: the number of ids of each story's prompt, uint32."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest(DataManifest):
    """Contents of `shard.json`, which exists only if the files of the shard are complete."""

    tokenizer_sha256: str
    token_dtype: str
    code_version: str
    files: dict[str, ShardFiles]

    def differences(self, inputs: "ShardManifest") -> list[str]:
        """Return one phrase for each difference to stories, tokenizer, dtype and version of `inputs`."""
        return [phrase for name, phrase in _INPUTS.items() if getattr(self, name) != getattr(inputs, name)]


def load_shard(folder: Path) -> ShardManifest | None:
    """Return the manifest of a complete shard; None if the manifest or a file of it is missing.

    Raises:
        UserError: the manifest is damaged.
    """
    if not (folder / "shard.json").exists():
        return None
    manifest = ShardManifest.load(folder / "shard.json")
    itemsize = np.dtype(manifest.token_dtype).itemsize
    for split, counts in manifest.files.items():
        sizes = {"bin": itemsize * counts["num_tokens"], "prompts.bin": 4 * counts["num_stories"]}
        for suffix, size in sizes.items():
            path = folder / f"{split}.{suffix}"
            if not path.is_file() or path.stat().st_size != size:
                return None
    return manifest


def load_shards(data_dir: Path, num_shards: int, inputs: ShardManifest) -> list[tuple[Path, ShardManifest]]:
    """Return folder and manifest of all `num_shards` shards in order.

    Raises:
        UserError: shards are missing, or have other stories, tokenizer, dtype or version than `inputs`.
    """
    found, problems = [], {}
    for shard in (Shard(rank, num_shards) for rank in range(num_shards)):
        manifest = load_shard(folder := shard.folder(data_dir))
        differences = ["no complete files"] if manifest is None else manifest.differences(inputs)
        if differences:
            problems[str(shard)] = f"{shard} has {' and '.join(differences)}"
        elif manifest is not None:
            found.append((folder, manifest))
    if problems:
        listed = list(problems.values())[:_LISTED_SHARDS]
        if len(problems) > len(listed):
            listed.append(f"{len(problems) - len(listed)} more")
        raise UserError(
            f"merge_shards ({num_shards}): {shards_folder(data_dir)} is not complete: {', '.join(listed)}; "
            f"run prepare_data with --shard {next(iter(problems))}"
            + (" and with each of the others" if len(problems) > 1 else "")
        )
    return found


def merge_split(
    shards: Sequence[tuple[Path, ShardManifest]], split: str, path: Path
) -> tuple[int, np.ndarray]:
    """Write the token ids of `split` of all shards to `path`.

    Returns:
        The number of ids, and the number of ids of each story's prompt, uint32 (num_stories,).

    Raises:
        UserError: a file is damaged.
    """
    num_tokens, prompts = 0, []
    with path.open("wb") as merged:
        for folder, manifest in shards:
            counts = manifest.files[split]
            for chunk in _read_checked(folder / f"{split}.bin", counts["tokens_sha256"]):
                merged.write(chunk)
            prompts += _read_checked(folder / f"{split}.prompts.bin", counts["prompts_sha256"])
            num_tokens += counts["num_tokens"]
    return num_tokens, np.frombuffer(b"".join(prompts), dtype="<u4")


def _read_checked(path: Path, sha256: str) -> Iterator[bytes]:
    """Yield the contents of a file in chunks, and compare its SHA-256 at the end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{path} is damaged: its SHA-256 differs from that in shard.json; delete {path.parent}, "
            "and run its shard again"
        )

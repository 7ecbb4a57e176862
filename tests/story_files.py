"""Story files of small tests: parquet, JSONL, text, and compressed forms of them."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: Path, stories: list[str | None], column: str = "text") -> Path:
    """Write the stories to `column` beside a column of ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(stories)), column: pa.array(stories, pa.string())}), path)
    return path


def write_jsonl(path: Path, stories: list[str | None], key: str = "text") -> Path:
    """Write one object per story, with `key` beside an id."""
    path.write_text("".join(json.dumps({"id": 1, key: story}) + "\n" for story in stories), encoding="utf-8")
    return path


def write_text(path: Path, stories: list[str]) -> Path:
    """Write plain text with a separator line after each story."""
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories), encoding="utf-8")
    return path


def compress(path: Path, suffix: str) -> Path:
    """Write the file again as .gz, .xz or .zst beside itself."""
    compressed = path.with_name(path.name + suffix)
    if suffix == ".zst":
        with pa.CompressedOutputStream(compressed, "zstd") as file:
            file.write(path.read_bytes())
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress}[suffix]
        compressed.write_bytes(compress(path.read_bytes()))
    return compressed

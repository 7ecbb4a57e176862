"""Compare ways to encode stories with one byte-level BPE: MB of text per second, ids compared on every story.

    python benchmarks/data.py --data STORIES.parquet

The vocabulary is trained on the stories. tiktoken takes part if it is installed (`pip install tiktoken`),
with the same pattern and ranks. Writes benchmarks/results/data.json and the table of docs/speed.md; `--quick`
encodes stories of the grammar once and writes nothing.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from harness import ROOT, Stats, fill_table, markdown_table, provenance, run_interleaved, write_result
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.file_formats import read_parquet
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.tokenizer import encode_stories, train_story_tokenizer
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.kernels.encoding.bindings import byte_letters

OURS = "encoding kernel, one thread"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BATCH_STORIES = 4096

Encode = Callable[[list[str]], Any]
"""Stories -> their ids, in the form that the encoder returns."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file with a column `text`")
    parser.add_argument("--stories", type=int, default=20_000)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few stories, one round; writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.stories, args.rounds, args.vocab_size = 200, 1, 300
    source = read_parquet(args.data) if args.data else open_stories("builtin")["train"]()
    stories = list(islice(filter(None, source), args.stories))
    num_bytes = sum(len(story.encode("utf-8")) for story in stories)
    tokenizer = train_story_tokenizer(stories, args.vocab_size)
    contenders = encoders(tokenizer)
    expected = encode_stories(tokenizer, stories)
    outcomes = run_interleaved(
        {name: partial(_measure, encode, stories, expected) for name, encode in contenders.items()},
        args.rounds,
    )
    speeds = {name: Stats.of([num_bytes / 1e6 / run for run in runs]) for name, runs in outcomes.items()}
    table = _format_table(speeds)
    print(table)
    if not args.quick:
        packages = ("tokenizers", "tiktoken", "datasets", "pyarrow", "numpy")
        result = {**provenance(packages), "stories": len(stories), "bytes": num_bytes}
        write_result("data", result | {"vocab_size": args.vocab_size, "megabytes_per_second": speeds})
        fill_table(ROOT / "docs" / "speed.md", "python benchmarks/data.py", table)


def encoders(tokenizer: PreTrainedTokenizerFast) -> dict[str, Encode]:
    """Return the contenders: stories -> ids of each."""
    found: dict[str, Encode] = {
        OURS: partial(_encode_ours, tokenizer),
        "`encode_batch_fast` of tokenizers": partial(encode_stories, tokenizer),
        "`datasets.map` with the tokenizer": partial(_encode_by_map, tokenizer),
    }
    try:
        import tiktoken
    except ImportError:
        return found
    vocabulary = tokenizer.get_vocab()
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {
        bytes(bytes_of[letter] for letter in token): index
        for token, index in vocabulary.items()
        if set(token) <= bytes_of.keys() and token not in tokenizer.all_special_tokens
    }
    peer = tiktoken.Encoding("stories", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return found | {
        "tiktoken, `encode_ordinary_batch`": partial(
            peer.encode_ordinary_batch, num_threads=num_usable_cores()
        )
    }


def _measure(encode: Encode, stories: list[str], expected: list[list[int]]) -> float:
    """Return the seconds of one encoding.

    Raises:
        ValueError: the ids of a story are others than the tokenizer's.
    """
    start_s = time.perf_counter()
    ids = encode(stories)
    seconds = time.perf_counter() - start_s
    if _to_lists(ids) != expected:
        raise ValueError("the ids differ")
    return seconds


def _to_lists(ids: Any) -> list[list[int]]:
    if isinstance(ids, datasets.Dataset):
        return ids["ids"][:]
    if isinstance(ids, np.ndarray):  # 0 ends each story
        return [
            part[1:].tolist()
            for part in np.split(np.insert(ids, 0, 0)[:-1], np.flatnonzero(ids == 0)[:-1] + 1)
        ]
    return ids


def _encode_ours(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> np.ndarray:
    """Encode as `prepare_data` does: row groups of a string array, from an encoder without known pieces."""
    encoder = StoryEncoder(tokenizer)
    batches = (stories[start : start + BATCH_STORIES] for start in range(0, len(stories), BATCH_STORIES))
    return np.concatenate([encoder.encode(pa.array(batch)) for batch in batches])


def _encode_by_map(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> datasets.Dataset:
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"text": stories}).map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=num_usable_cores(),
        remove_columns=["text"],
        load_from_cache_file=False,
    )


def _format_table(speeds: dict[str, Stats]) -> str:
    rows = [
        (name, stats.text("{:.1f}"), speeds[OURS].ratio_to(stats).text("{:.1f}"))
        for name, stats in speeds.items()
    ]
    return markdown_table(["", "MB/s", "the kernel is faster by"], rows)


if __name__ == "__main__":
    main()

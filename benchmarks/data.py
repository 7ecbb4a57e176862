"""Compare ways to encode stories with one byte-level BPE, and two ways to train it.

    python benchmarks/data.py --data STORIES.parquet

Encoding: MB of text per second, ids compared on every story. The vocabulary is trained on the stories.
tiktoken takes part if it is installed (`pip install tiktoken`), with the same pattern and ranks. Training:
seconds for these stories and for 200,000 of the grammar, tokenizers compared to the byte.

Writes benchmarks/results/data.json, data_training.json and the tables of docs/speed.md; `--only` selects one
of them. `--quick` takes few stories of the grammar once and writes nothing.
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
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.source_stories import open_stories
from tinystories_slm.data.sources.file_formats import read_parquet
from tinystories_slm.data.story_encoder import StoryEncoder
from tinystories_slm.data.tokenizer import (
    encode_stories,
    train_bpe,
    train_story_tokenizer,
    train_with_library,
)
from tinystories_slm.grammar import generate_corpus
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
    parser.add_argument("--grammar_stories", type=int, default=200_000)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("encoding", "training"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="few stories, one round; writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.stories, args.grammar_stories, args.rounds, args.vocab_size = 200, 300, 1, 300
    source = read_parquet(args.data) if args.data else open_stories("builtin")["train"]()
    stories = list(islice(filter(None, source), args.stories))
    if args.only != "training":
        measure_encoding(stories, args)
    if args.only != "encoding":
        measure_training(stories, args)


def measure_encoding(stories: list[str], args: argparse.Namespace) -> None:
    """Measure the speed of each encoder, and print and write the table."""
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


def measure_training(stories: list[str], args: argparse.Namespace) -> None:
    """Measure the training of the vocabulary, and print and write the table."""
    corpora = {"these": stories, "the grammar's": list(generate_corpus(args.grammar_stories))}
    rows, results = [], {}
    for name, corpus in corpora.items():
        trainers = {
            "tokenizers": partial(_time_training, train_with_library, corpus, args.vocab_size),
            "ours": partial(_time_training, train_bpe, corpus, args.vocab_size),
        }
        outcomes = run_interleaved(trainers, args.rounds)
        if len({tokenizer for runs in outcomes.values() for _, tokenizer in runs}) > 1:
            raise ValueError("the tokenizers differ")
        seconds = {key: Stats.of([run for run, _ in runs]) for key, runs in outcomes.items()}
        num_bytes = sum(len(story.encode("utf-8")) for story in corpus)
        size = f"{name}, {len(corpus):,} ({num_bytes / 1e6:.0f} MB)"
        ratio = seconds["tokenizers"].ratio_to(seconds["ours"])
        rows.append((size, *(stats.text("{:.1f}") for stats in (*seconds.values(), ratio))))
        results[name] = {"stories": len(corpus), "bytes": num_bytes, "seconds": seconds}
    table = markdown_table(["stories", "`BpeTrainer`, s", "ours, s", "ours is faster by"], rows)
    print(table)
    if not args.quick:
        head = {**provenance(("tokenizers", "numpy")), "vocab_size": args.vocab_size}
        write_result("data_training", head | {"corpora": results})
        fill_table(ROOT / "docs" / "speed.md", "python benchmarks/data.py, training", table)


def _time_training(
    train: Callable[[list[str], int], Tokenizer], stories: list[str], vocab_size: int
) -> tuple[float, str]:
    """Return the seconds of one training and the text of the tokenizer."""
    start_s = time.perf_counter()
    tokenizer = train(stories, vocab_size)
    return time.perf_counter() - start_s, tokenizer.to_str()


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

"""Vocabularies of several sizes, trained on the same stories: compression, and share of the model."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from transformers import PreTrainedTokenizerFast

from tinystories_slm.config import RunConfig
from tinystories_slm.data.tokenizer import (
    as_story_tokenizer,
    embedding_rows,
    encode_stories,
    num_bpe_entries,
    train_on_chunks,
)
from tinystories_slm.model_costs import num_parameters

SIZES = (512, 1024, 2048, 4096, 8192)
"""Vocabularies that are trained, beside that of the configuration."""
SMALL_GAIN = 0.05
"""A doubling that shortens the text by less is not worth it in the sentence of the report."""
MAX_RARE_SHARE = 0.5
"""A larger share of rare entries is not worth it either."""
RARE = 100
"""An entry with fewer occurrences in the sample is rare."""


class Vocabulary(TypedDict):
    """One vocabulary; the compression is that of all validation stories."""

    vocab_size: int
    is_configured: bool
    """Whether `tokenizer` of the configuration gives this vocabulary."""
    bytes_per_token: float
    """UTF-8 bytes of the text for each token, without `<|endoftext|>`."""
    tokens_per_story: float
    """With `<|endoftext|>`."""
    num_rare: int
    """Entries with fewer than 100 occurrences in the training sample; special tokens and bytes included."""
    embedding_parameters: int
    """Weights of the embedding for the width of the configuration."""
    embedding_share: float
    """Their share of all parameters of the model of the configuration."""


def compare_vocabularies(
    config: RunConfig,
    chunks: Mapping[str, int],
    validation_chunks: Mapping[str, int],
    num_validation_stories: int,
) -> tuple[list[Vocabulary], PreTrainedTokenizerFast | None]:
    """Train and measure the vocabularies, in the order of their sizes.

    Args:
        config: Its `tokenizer` and `model` are used.
        chunks: Counts of the chunks of the training sample (`count_story_chunks`).
        validation_chunks: Those of all validation stories.
        num_validation_stories: Number of these.

    Returns:
        The vocabularies without those that the stories do not fill, and the tokenizer of the configuration;
        None if that is `tokenizer.pretrained`.
    """
    configured = None
    found: dict[int, Vocabulary] = {}
    wanted = None if config.tokenizer.pretrained else config.tokenizer.vocab_size
    for size in sorted({*SIZES, *([wanted] if wanted else [])}):
        tokenizer = as_story_tokenizer(train_on_chunks(chunks, num_bpe_entries(size)), size)
        is_configured = size == wanted
        if is_configured:
            configured = tokenizer
        if len(tokenizer) in found:  # the stories fill no larger one
            found[len(tokenizer)]["is_configured"] |= is_configured
            continue
        found[len(tokenizer)] = _measure(
            tokenizer, config, chunks, validation_chunks, num_validation_stories, is_configured
        )
    return [found[size] for size in sorted(found)], configured


def _measure(
    tokenizer: PreTrainedTokenizerFast,
    config: RunConfig,
    chunks: Mapping[str, int],
    validation_chunks: Mapping[str, int],
    num_stories: int,
    is_configured: bool,
) -> Vocabulary:
    size = embedding_rows(tokenizer)
    occurrences = _count_tokens(tokenizer, chunks, size)
    num_tokens = int(_count_tokens(tokenizer, validation_chunks, size).sum())
    num_bytes = sum(len(chunk.encode("utf-8")) * count for chunk, count in validation_chunks.items())
    embedding = size * config.model.hidden_size
    return Vocabulary(
        vocab_size=size,
        is_configured=is_configured,
        bytes_per_token=round(num_bytes / max(1, num_tokens), 3),
        tokens_per_story=round((num_tokens + num_stories) / num_stories, 1),
        num_rare=int((occurrences < RARE).sum()),
        embedding_parameters=embedding,
        embedding_share=round(embedding / num_parameters(config.model_config(vocab_size=size)), 4),
    )


def _count_tokens(tokenizer: PreTrainedTokenizerFast, chunks: Mapping[str, int], size: int) -> np.ndarray:
    """Return the occurrences of each token in the text of the `chunks`, int64 (size,)."""
    ids = encode_stories(tokenizer, list(chunks))
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    flat = np.array([token for one in ids for token in one], dtype=np.int64)
    weights = np.repeat(np.array(list(chunks.values()), dtype=np.int64), lengths)
    return np.bincount(flat, weights=weights, minlength=size).astype(np.int64)


def describe_choice(vocabularies: Sequence[Vocabulary]) -> str:
    """Return the sentence that states which of the trained vocabularies to choose, and why.

    It is the smallest one whose doubling shortens the text by less than 5 %, or has mostly rare entries.
    """
    largest = vocabularies[-1]
    is_full = largest["vocab_size"] < SIZES[-1]  # the stories fill no larger one
    for one in vocabularies:
        size = one["vocab_size"]
        doubled = next((other for other in vocabularies if other["vocab_size"] == 2 * size), None)
        if doubled is None and is_full and size < largest["vocab_size"] < 2 * size:
            doubled = largest
        if doubled is None:
            continue
        gain = 1 - one["bytes_per_token"] / doubled["bytes_per_token"]
        rare_share = doubled["num_rare"] / doubled["vocab_size"]
        if gain < SMALL_GAIN or rare_share > MAX_RARE_SHARE:
            added = doubled["embedding_parameters"] - one["embedding_parameters"]
            shares = [f"{100 * vocabulary['embedding_share']:.0f} %" for vocabulary in (one, doubled)]
            return (
                f"Choose {size:,} entries: {doubled['vocab_size']:,} make the text {100 * gain:.1f} % "
                f"shorter, but add {added:,} parameters to the embedding ({shares[1]} of the model instead "
                f"of {shares[0]}), and {100 * rare_share:.0f} % of the entries occur fewer than {RARE} times."
            )
    if is_full:
        return f"Choose {largest['vocab_size']:,} entries: the stories fill no more."
    return (
        f"Choose {largest['vocab_size']:,} entries or more: each doubling still shortens the text by "
        f"{100 * SMALL_GAIN:.0f} % or more."
    )

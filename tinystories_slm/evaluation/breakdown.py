"""Scores by position in the story and by length of the story.

Positions and lengths are in UTF-8 bytes, so that they are the same for every tokenizer. The scores are of the
text alone: the end token, which some models do not have, is left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.tokenizer import token_character_ends

POSITION_EDGES = (0, 100, 200, 400, 800, 1600)
"""First byte of each bucket of positions."""
LENGTH_EDGES = (0, 250, 500, 1000, 2000, 4000)
"""Bytes of the shortest story in each bucket of lengths."""

Bucket = dict[str, Any]


def token_ends(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return for each text the UTF-8 bytes before the end of each of its tokens, int64, (T,)."""
    character_ends = token_character_ends(tokenizer, texts)
    return [_byte_ends(text, ends) for text, ends in zip(texts, character_ends, strict=True)]


def _byte_ends(text: str, character_ends: Sequence[int]) -> np.ndarray:
    ends = np.maximum.accumulate(np.array(character_ends, dtype=np.int64))
    if text.isascii():
        return ends
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])[ends]


def scores_by_position(token_nats: np.ndarray, ends: Sequence[np.ndarray], *, is_lossy: bool) -> list[Bucket]:
    """Return the scores of the tokens that begin in each bucket of `POSITION_EDGES`.

    Args:
        token_nats: Nats of the tokens of all texts, without end tokens, (sum of T,).
        ends: As `token_ends` returns them.
        is_lossy: Leave out bits per byte.
    """
    starts = np.concatenate([np.concatenate([[0], story[:-1]]) for story in ends if len(story)])
    sizes = np.concatenate([np.diff(story, prepend=0) for story in ends])
    return _score_buckets(starts, token_nats, np.ones(len(starts)), sizes, POSITION_EDGES, is_lossy)


def scores_by_length(
    nats: np.ndarray, num_tokens: np.ndarray, num_bytes: np.ndarray, *, is_lossy: bool
) -> list[Bucket]:
    """Return the scores of the stories whose length lies in each bucket of `LENGTH_EDGES`.

    The arrays have shape (N,): sums over the text of each story, without end token.
    """
    buckets = _score_buckets(num_bytes, nats, num_tokens, num_bytes, LENGTH_EDGES, is_lossy)
    of_story = np.searchsorted(LENGTH_EDGES, num_bytes, side="right") - 1
    counts = np.bincount(of_story, minlength=len(LENGTH_EDGES))
    for bucket in buckets:
        bucket["num_stories"] = int(counts[LENGTH_EDGES.index(bucket["from_byte"])])
    return buckets


def _score_buckets(
    places: np.ndarray,
    nats: np.ndarray,
    num_tokens: np.ndarray,
    num_bytes: np.ndarray,
    edges: Sequence[int],
    is_lossy: bool,
) -> list[Bucket]:
    """Return the scores of the items in each bucket that has tokens; `places` are in bytes."""
    of_item = np.searchsorted(edges, places, side="right") - 1
    sums = [np.bincount(of_item, weights, len(edges)) for weights in (nats, num_tokens, num_bytes)]
    buckets: list[Bucket] = []
    for first, last, nats_sum, tokens, size in zip(edges, [*edges[1:], None], *sums, strict=True):
        if not tokens:
            continue
        bucket = {"from_byte": first, "to_byte": last, "num_tokens": int(tokens), "num_bytes": int(size)}
        bucket["loss"] = nats_sum / tokens
        if size and not is_lossy:
            bucket["bits_per_byte"] = nats_sum / math.log(2) / size
        buckets.append({name: float(v) if isinstance(v, np.floating) else v for name, v in bucket.items()})
    return buckets

"""Stories of a token file: where each one ends, and their ids one by one."""

from collections.abc import Iterator

import numpy as np

_CHUNK_TOKENS = 2**20


def document_ends(tokens: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Return the index of each end-of-text id in `tokens` (num_tokens,), int64 (num_stories,)."""
    chunks = range(0, len(tokens), _CHUNK_TOKENS)
    ends = [start + np.flatnonzero(tokens[start : start + _CHUNK_TOKENS] == eos_token_id) for start in chunks]
    return np.concatenate(ends or [np.zeros(0, np.int64)])


def iter_documents(tokens: np.ndarray, eos_token_id: int, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yield the first `limit` stories of a token file, each without its end-of-text id.

    Args:
        tokens: Token ids `(num_tokens,)`, usually the memory map of `prepare.open_tokens`.
        eos_token_id: End-of-text id that follows each story.
        limit: Maximum number of stories; None for all.

    Yields:
        Copies, int64 (story_length,). An incomplete story after the last end-of-text id is skipped.
    """
    start, num_stories = 0, 0
    for chunk in range(0, len(tokens), _CHUNK_TOKENS):
        ends = chunk + np.flatnonzero(tokens[chunk : chunk + _CHUNK_TOKENS] == eos_token_id)
        for end in ends.tolist():
            if num_stories == limit:
                return
            yield tokens[start:end].astype(np.int64)
            start, num_stories = end + 1, num_stories + 1

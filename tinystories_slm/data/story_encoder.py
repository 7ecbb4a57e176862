"""Token ids of many stories: by the C kernel where it fits tokenizer and text, else by the tokenizer."""

import logging
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from tinystories_slm.data.instruct import BLOCK_START, story_start
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.kernels.encoding.bindings import BytePairEncoder, load_encoder

logger = logging.getLogger(__name__)

_NUM_COMPARED = 100


class StoryEncoder:
    """Encodes stories as `encode_stories` does, and adds the end-of-text id to each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._kernel: BytePairEncoder | None = load_encoder(tokenizer.backend_tokenizer.to_str())
        self._is_compared = False

    def encode(self, stories: pa.Array) -> np.ndarray:
        """Return the ids of all `stories`, a string array without nulls, int64 (num_ids,)."""
        if self._kernel is not None and not self._is_compared:
            self._compare(stories)
        eos = self._tokenizer.eos_token_id
        if self._kernel is None:
            texts = encode_stories(self._tokenizer, stories.to_pylist())
            return np.array([token for ids in texts for token in (*ids, eos)], dtype=np.int64)
        ids, ends, is_left = self._kernel.encode(*_buffers(stories))
        left = encode_stories(self._tokenizer, stories.filter(pa.array(is_left)).to_pylist())
        lengths = np.diff(ends, prepend=0)
        lengths[is_left] = [len(story) for story in left]
        new_ends = np.cumsum(lengths + 1)
        new_starts = new_ends - lengths - 1
        joined = np.full(new_ends[-1] if len(new_ends) else 0, eos, dtype=np.int64)
        # Each id moves by as much as its story does.
        moved = np.repeat((new_starts - (ends - lengths))[~is_left], lengths[~is_left])
        joined[np.arange(len(ids)) + moved] = ids
        for start, story in zip(new_starts[is_left], left, strict=True):
            joined[start : start + len(story)] = story
        return joined

    def prompt_lengths(self, stories: pa.Array) -> np.ndarray:
        """Return the number of ids before the story of each block, uint32 (num_stories,), 0 without one."""
        lengths = np.zeros(len(stories), dtype=np.uint32)
        starts = {
            row: start
            for row in np.flatnonzero(pc.match_substring_regex(stories, BLOCK_START)).tolist()
            if (start := story_start(stories[row].as_py())) is not None
        }
        if starts:
            prompts = pa.array([stories[row].as_py()[:start] for row, start in starts.items()], pa.string())
            ends = np.flatnonzero(self.encode(prompts) == self._tokenizer.eos_token_id)
            lengths[list(starts)] = np.diff(ends, prepend=-1) - 1
        return lengths

    def _compare(self, stories: pa.Array) -> None:
        """Stop using the kernel if its ids of the first stories are not those of the tokenizer."""
        self._is_compared = True
        sample = stories[:_NUM_COMPARED]
        ids, ends, is_left = self._kernel.encode(*_buffers(sample))
        expected = encode_stories(self._tokenizer, sample.to_pylist())
        found = [ids[start:end].tolist() for start, end in pairwise([0, *ends.tolist()])]
        if any(not left and one != other for left, one, other in zip(is_left, found, expected, strict=True)):
            logger.warning("the encoding kernel does not fit this tokenizer: using the tokenizer itself")
            self._kernel = None


def _buffers(stories: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the UTF-8 bytes and the offsets of a string array, without a copy of the bytes."""
    stories = stories.cast(pa.large_string())
    _, offsets, data = stories.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[stories.offset : stories.offset + len(stories) + 1]
    has_bytes = data is not None and data.size
    return np.frombuffer(data if has_bytes else b"\0", dtype=np.uint8), np.ascontiguousarray(starts)

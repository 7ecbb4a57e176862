"""Token files -> training windows: a memory map, read in an order that is a function of (seed, step)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinystories_slm.errors import InputError


class Windows:
    """Endless epochs of `seq_len`-token windows of one token file.

    In an epoch every window comes exactly once, in a fresh order. Nothing depends on what was read
    before, so a resumed run and any number of processes see the same batches.

    Without `eos_token_id` the windows tile the file, read as a ring: each epoch starts its cuts at
    another token and still has the same number of windows, so a token meets another context in every
    epoch. With it, each window opens with the end-of-text token before a story and the story's first
    tokens, as generation does, and runs on into the next story; a story of `seq_len` tokens or more
    opens further windows, each with the last token of the one before, so that every token is predicted
    once at least. Tokens late in a window come again in the next. One window in eight, others in each
    epoch, leaves its first token out, so that a prompt without the end-of-text token is not strange.
    """

    def __init__(
        self, path: Path, *, token_dtype: str, seq_len: int, seed: int, eos_token_id: int | None = None
    ) -> None:
        """
        Args:
            path: Token ids without a header, little-endian.
            token_dtype: "uint16" or "uint32".
            seq_len: Tokens in a window.
            seed: Of the order and of the epochs' first cuts; 0 or more.
            eos_token_id: Follows each story; given, windows open with stories.

        Raises:
            InputError: the file holds not even one window, or no whole number of ids.
        """
        self.path = path
        self.seq_len = seq_len
        self.seed = seed
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        num_bytes = path.stat().st_size
        if num_bytes % self._dtype.itemsize:
            raise InputError(
                f"{path} ({num_bytes} bytes) holds no whole number of {token_dtype}; make it anew"
            )
        self.num_tokens = num_bytes // self._dtype.itemsize
        if self.num_tokens < seq_len:
            raise InputError(
                f"data.seq_len ({seq_len}) is longer than the {self.num_tokens} tokens of {path}; "
                "shorten it, or bring more stories"
            )
        self._openings = None if eos_token_id is None else self._find_openings(eos_token_id)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self.num_tokens // self.seq_len if self._openings is None else len(self._openings)

    def batch(self, step: int, batch_size: int, *, rows: slice = slice(None)) -> np.ndarray:
        """The sequences of optimizer step `step` (from 0), or only those `rows` of them.

        Returns:
            Token ids, int64 (batch_size, seq_len); fewer rows where `rows` picks fewer.
        """
        positions = [step * batch_size + row for row in range(batch_size)[rows]]
        starts = np.array([self._start(position) for position in positions], dtype=np.int64)
        index = (starts[:, None] + np.arange(self.seq_len)) % self.num_tokens
        return self._tokens()[index].astype(np.int64)

    def _start(self, position: int) -> int:
        """First token of the window at `position` of the endless stream of epochs."""
        epoch, number = divmod(position, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._starts_of(np.random.default_rng([self.seed, epoch]))
        return int(self._epoch[1][number])

    def _starts_of(self, epoch: np.random.Generator) -> np.ndarray:
        """First token of every window of an epoch, in its order, int64 (windows,)."""
        if self._openings is None:
            offset = epoch.integers(self.seq_len)
            return offset + epoch.permutation(len(self)) * self.seq_len
        return epoch.permutation(self._openings) + (epoch.integers(8, size=len(self)) == 0)

    def _find_openings(self, eos_token_id: int) -> np.ndarray:
        """Where windows that open with stories start, int64 (windows,): 8 bytes of memory for each."""
        tokens, chunk_tokens = self._tokens(), 2**20
        ends = np.concatenate(
            [
                chunk + np.flatnonzero(tokens[chunk : chunk + chunk_tokens] == eos_token_id)
                for chunk in range(0, self.num_tokens, chunk_tokens)
            ]
        )
        # The file is a ring: its last end-of-text token stands before its first story.
        firsts = np.concatenate([[-1], ends[:-1]])
        stride = self.seq_len - 1  # the first token of a window is given, not predicted
        per_story = -(-(ends - firsts) // stride)
        number_in_story = np.arange(per_story.sum()) - np.repeat(np.cumsum(per_story) - per_story, per_story)
        return (np.repeat(firsts, per_story) + number_in_story * stride) % self.num_tokens

    def _tokens(self) -> np.memmap:
        # Opened anew each time: the pages of a map that stays open count as this process's memory.
        return np.memmap(self.path, dtype=self._dtype, mode="r", shape=(self.num_tokens,))


def read_stories(tokens: np.ndarray, eos_token_id: int, limit: int | None = None) -> Iterator[np.ndarray]:
    """The first `limit` stories of a token file, each without its end-of-text id.

    Args:
        tokens: Token ids `(num_tokens,)`, usually the memory map of `prepare.open_tokens`.
        eos_token_id: Follows each story.
        limit: Stories at most; null for all.

    Yields:
        Copies, int64 (story length,); what follows the last end-of-text id is not a whole story.
    """
    chunk_tokens = 2**20
    begin, taken = 0, 0
    for chunk in range(0, len(tokens), chunk_tokens):
        ends = chunk + np.flatnonzero(tokens[chunk : chunk + chunk_tokens] == eos_token_id)
        for end in ends.tolist():
            if taken == limit:
                return
            yield tokens[begin:end].astype(np.int64)
            begin, taken = end + 1, taken + 1

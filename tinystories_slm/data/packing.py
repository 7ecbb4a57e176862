"""Training windows of a memory-mapped token file, in an order that is a function of (seed, step)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinystories_slm.errors import UserError

IGNORED_LABEL = -100
"""Label of a token that is not trained on, as in `torch.nn.CrossEntropyLoss`."""


class Batch(NamedTuple):
    """Sequences of one optimizer step, as a model reads and predicts them."""

    input_ids: np.ndarray
    """Token ids, int64 (batch_size, seq_len)."""
    labels: np.ndarray
    """Token ids to predict, unshifted, int64 (batch_size, seq_len), or `IGNORED_LABEL`. Usually
    `input_ids` itself."""


class PackedDataset(ABC):
    """Endless epochs of `seq_len`-token windows of one token file.

    Each epoch contains every window exactly once, in a new order. A batch depends only on (seed, step),
    so a resumed run and any number of processes see the same batches. A subclass defines the windows.
    """

    def __init__(self, path: Path, *, token_dtype: str, seq_len: int, seed: int, eos_token_id: int) -> None:
        """
        Args:
            path: Token ids without a header, little-endian.
            token_dtype: "uint16" or "uint32".
            seq_len: Tokens per window.
            seed: Seed of the window order; 0 or more.
            eos_token_id: End-of-text id that follows each story.

        Raises:
            UserError: the file is shorter than one window, or its size is not a multiple of the id size.
        """
        self.path = path
        self.seq_len = seq_len
        self.seed = seed
        self.eos_token_id = eos_token_id
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        num_bytes = path.stat().st_size
        if num_bytes % self._dtype.itemsize:
            raise UserError(
                f"{path} ({num_bytes} bytes): the size must be a multiple of {self._dtype.itemsize} bytes "
                f"({token_dtype}); delete the file and prepare the data again"
            )
        self.num_tokens = num_bytes // self._dtype.itemsize
        if self.num_tokens < seq_len:
            raise UserError(
                f"data.seq_len ({seq_len}) is longer than the {self.num_tokens} tokens of {path}; "
                "reduce it, or use more stories"
            )
        self._epoch_starts: tuple[int, np.ndarray] | None = None  # epoch, starts in its order

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of windows per epoch."""

    @abstractmethod
    def window_starts(self, rng: np.random.Generator) -> np.ndarray:
        """Return the first token of every window of an epoch, in the epoch's order, int64 (num_windows,).

        `rng` depends on seed and epoch. The file is read as a ring, so a start may exceed it.
        """

    def labels(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the labels of `input_ids`, int64 of the same shape (num_rows, seq_len); see `Batch`."""
        return input_ids

    def batch(self, step: int, batch_size: int, *, rows: slice = slice(None)) -> Batch:
        """Return the sequences of optimizer step `step` (from 0), or a subset of them.

        Args:
            step: Optimizer step, from 0.
            batch_size: Sequences per step.
            rows: Rows of the batch to return; default all.
        """
        positions = [step * batch_size + row for row in range(batch_size)[rows]]
        starts = np.array([self._window_start(position) for position in positions], dtype=np.int64)
        index = (starts[:, None] + np.arange(self.seq_len)) % self.num_tokens
        input_ids = self.tokens()[index].astype(np.int64)
        return Batch(input_ids, self.labels(input_ids))

    def tokens(self) -> np.memmap:
        """Return the ids of the file, (num_tokens,)."""
        # Reopened for each batch: the pages of an open map count as memory of this process.
        return np.memmap(self.path, dtype=self._dtype, mode="r", shape=(self.num_tokens,))

    def _window_start(self, position: int) -> int:
        """First token of the window at `position` in the endless stream of epochs."""
        epoch, index = divmod(position, len(self))
        if self._epoch_starts is None or self._epoch_starts[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch_starts = epoch, self.window_starts(rng)
        return int(self._epoch_starts[1][index])


class ContiguousPacking(PackedDataset):
    """Windows that tile the file, which is read as a ring.

    Each epoch starts at another token offset and has the same number of windows, so a token has a different
    context in every epoch.
    """

    def __len__(self) -> int:
        return self.num_tokens // self.seq_len

    def window_starts(self, rng: np.random.Generator) -> np.ndarray:
        offset = rng.integers(self.seq_len)
        return offset + rng.permutation(len(self)) * self.seq_len


class DocumentPacking(PackedDataset):
    """Windows that start with a story, as generation does, and continue into the next one.

    A window starts with the end-of-text token before a story. A story of `seq_len` tokens or more gets
    further windows; each starts with the last token of the window before it, so every token is predicted at
    least once. Late tokens of a window occur again in the next one. One window in eight, redrawn each epoch,
    omits its first token, so that the model also learns prompts without the end-of-text token.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._starts = self._document_starts()

    def __len__(self) -> int:
        return len(self._starts)

    def window_starts(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self._starts) + (rng.integers(8, size=len(self)) == 0)

    def _document_starts(self) -> np.ndarray:
        """First token of each window in the order of the file, int64 (num_windows,), 8 bytes per window."""
        tokens, chunk_tokens = self.tokens(), 2**20
        ends = np.concatenate(
            [
                chunk + np.flatnonzero(tokens[chunk : chunk + chunk_tokens] == self.eos_token_id)
                for chunk in range(0, self.num_tokens, chunk_tokens)
            ]
        )
        # The file is a ring: its last end-of-text token precedes its first story.
        firsts = np.concatenate([[-1], ends[:-1]])
        stride = self.seq_len - 1  # a window predicts all of its tokens except the first
        per_story = -(-(ends - firsts) // stride)
        index_in_story = np.arange(per_story.sum()) - np.repeat(np.cumsum(per_story) - per_story, per_story)
        return (np.repeat(firsts, per_story) + index_in_story * stride) % self.num_tokens


PACKINGS: dict[str, type[PackedDataset]] = {"contiguous": ContiguousPacking, "document": DocumentPacking}
"""Packings by the name in `data.packing`; docs/extending.md adds one."""


def packing_class(name: str) -> type[PackedDataset]:
    """Return the entry of `PACKINGS`.

    Raises:
        UserError: there is no packing of that name.
    """
    if name not in PACKINGS:
        raise UserError(f"data.packing ({name}): must be one of {', '.join(PACKINGS)}")
    return PACKINGS[name]


def iter_documents(tokens: np.ndarray, eos_token_id: int, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yield the first `limit` stories of a token file, each without its end-of-text id.

    Args:
        tokens: Token ids `(num_tokens,)`, usually the memory map of `prepare.open_tokens`.
        eos_token_id: End-of-text id that follows each story.
        limit: Maximum number of stories; None for all.

    Yields:
        Copies, int64 (story_length,). An incomplete story after the last end-of-text id is skipped.
    """
    chunk_tokens = 2**20
    start, num_stories = 0, 0
    for chunk in range(0, len(tokens), chunk_tokens):
        ends = chunk + np.flatnonzero(tokens[chunk : chunk + chunk_tokens] == eos_token_id)
        for end in ends.tolist():
            if num_stories == limit:
                return
            yield tokens[start:end].astype(np.int64)
            start, num_stories = end + 1, num_stories + 1

"""Training windows of a memory-mapped token file, in an order that is a function of (seed, step)."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinystories_slm.data.packing.documents import document_ends
from tinystories_slm.data.packing.permutation import permute
from tinystories_slm.errors import UserError

IGNORED_LABEL = -100
"""Label of a token that is not trained on, as in `torch.nn.CrossEntropyLoss`."""

PADDING = -1
"""Position of a token of a window that is not in the file."""

ORDER_VERSION = 2
"""Version of the windows and of their order; a checkpoint of another one resumes with other batches."""


class Batch(NamedTuple):
    """Sequences of one optimizer step, as a model reads and predicts them."""

    input_ids: np.ndarray
    """Token ids, int64 (batch_size, seq_len)."""
    labels: np.ndarray
    """Token ids to predict, unshifted, int64 (batch_size, seq_len), or `IGNORED_LABEL`. Usually
    `input_ids` itself."""
    position_ids: np.ndarray | None = None
    """Position of each token in its story, int64 (batch_size, seq_len): attention does not cross stories.
    None: positions count from the start of the window."""


class WindowSource(ABC):
    """Training windows in an order that is a function of (seed, step)."""

    @abstractmethod
    def batch(self, step: int, batch_size: int, *, rows: slice = slice(None)) -> Batch:
        """Return the sequences of optimizer step `step` (from 0), or a subset of them.

        Args:
            step: Optimizer step, from 0.
            batch_size: Sequences per step.
            rows: Rows of the batch to return; default all.
        """

    def stream_position(self, step: int, batch_size: int) -> dict[str, Any] | None:
        """Return where a resumed run starts to read for `step`, as JSON; None for files."""
        return None

    @property
    def num_stories_read(self) -> int | None:
        """Number of training stories that a stream has read; None of files."""
        return None

    def close(self) -> None:  # noqa: B027
        """End what reads ahead; nothing for files."""


class TokenFile:
    """Token ids in a file without a header, little-endian.

    Raises:
        UserError: the size of the file is not a multiple of the id size.
    """

    def __init__(self, path: Path, token_dtype: str) -> None:
        self.path = path
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._identity = _file_identity(path)
        num_bytes = path.stat().st_size
        if num_bytes % self._dtype.itemsize:
            raise UserError(
                f"{path} ({num_bytes} bytes): the size must be a multiple of {self._dtype.itemsize} bytes "
                f"({token_dtype}); delete the file and prepare the data again"
            )
        self.num_tokens = num_bytes // self._dtype.itemsize

    def read(self) -> np.memmap:
        """Return the ids of the file, (num_tokens,).

        Raises:
            UserError: the file is no longer the one that was opened.
        """
        if _file_identity(self.path) != self._identity:
            raise UserError(
                f"{self.path} was replaced while this run reads it; resume the run, and use another "
                "--data.data_dir for data with other options"
            )
        # Reopened for each batch: the pages of an open map count as memory of this process.
        return np.memmap(self.path, dtype=self._dtype, mode="r", shape=(self.num_tokens,))


class PackedDataset(WindowSource):
    """Endless epochs of `seq_len`-token windows of one token file, or of ids in memory.

    Each epoch contains every window exactly once, in a new order. A batch depends only on (seed, step), so a
    resumed run and any number of processes see the same batches. A subclass defines the windows.
    """

    def __init__(
        self,
        source: Path | np.ndarray,
        *,
        token_dtype: str = "uint16",
        seq_len: int,
        seed: int,
        eos_token_id: int,
        mask_across_stories: bool = False,
        prompt_lengths: np.ndarray | None = None,
        excluded: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            source: A `TokenFile`, or the ids themselves, (num_tokens,).
            token_dtype: "uint16" or "uint32", of the file.
            seq_len: Tokens per window; 2 or more.
            seed: Seed of the window order; 0 or more.
            eos_token_id: End-of-text id that follows each story.
            mask_across_stories: Whether batches have `position_ids`.
            prompt_lengths: Number of tokens at the start of each story that are not trained on,
                (num_stories,).
            excluded: Whether each story is left out, bool (num_stories,): its tokens are replaced by
                `eos_token_id` and not predicted; every other token stays in its place.

        Raises:
            UserError: the file is shorter than one window, or its size is not a multiple of the id size.
        """
        self.seq_len = seq_len
        self.seed = seed
        self.eos_token_id = eos_token_id
        self.mask_across_stories = mask_across_stories
        self.prompt_lengths = prompt_lengths
        self.excluded = excluded
        self._ids = TokenFile(source, token_dtype) if isinstance(source, Path) else source
        if isinstance(source, np.ndarray):
            self.num_tokens = len(source)
            return
        self.num_tokens = self._ids.num_tokens
        if self.num_tokens < seq_len:
            raise UserError(
                f"data.seq_len ({seq_len}) is longer than the {self.num_tokens} tokens of {source}; "
                "reduce it, or use more stories"
            )

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of windows per epoch."""

    @abstractmethod
    def token_positions(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        """Return where the tokens of windows are in the file, int64 (n, seq_len), or `PADDING`.

        Args:
            epoch: Epoch, from 0; windows may differ between epochs.
            windows: Numbers of the windows, each in [0, len(self)), int64 (n,).

        The file is read as a ring, so a position may exceed it.
        """

    def labels(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the labels of a batch, int64 of the same shape (num_rows, seq_len); see `Batch`.

        Args:
            input_ids: Token ids (num_rows, seq_len).
            positions: Where they are in the file, or `PADDING`, (num_rows, seq_len).
        """
        if self.prompt_lengths is None:
            return input_ids
        ends = self.document_ends
        story = np.searchsorted(ends, positions).clip(max=len(ends) - 1)
        firsts = np.where(story > 0, ends[story - 1] + 1, 0)
        is_prompt = positions - firsts < self.prompt_lengths[story]
        return np.where(is_prompt, IGNORED_LABEL, input_ids)

    def batch(self, step: int, batch_size: int, *, rows: slice = slice(None)) -> Batch:
        return self._read(self.positions(step * batch_size + np.arange(batch_size)[rows]))

    def sequences(self, epochs: np.ndarray, numbers: np.ndarray) -> Batch:
        """Return sequences by epoch and place in it, each in [0, len(self)); both int64 (num_rows,)."""
        return self._read(self._positions(epochs, numbers))

    def _read(self, positions: np.ndarray) -> Batch:
        """Return the tokens at `positions` (num_rows, seq_len) as a batch."""
        input_ids = np.where(
            positions == PADDING, self.eos_token_id, self.tokens()[positions].astype(np.int64)
        )
        labels = self.labels(input_ids, positions)
        if self.excluded is not None:
            is_excluded = self.is_excluded(positions)
            labels = np.where(is_excluded, IGNORED_LABEL, labels)
            input_ids = np.where(is_excluded, self.eos_token_id, input_ids)
        position_ids = self._position_ids(input_ids) if self.mask_across_stories else None
        return Batch(input_ids, labels, position_ids)

    def is_excluded(self, positions: np.ndarray) -> np.ndarray:
        """Return whether the tokens at `positions` (num_rows, seq_len) belong to a story that is left out."""
        if self.excluded is None:
            return np.zeros(positions.shape, dtype=bool)
        story = np.searchsorted(self.document_ends, positions).clip(max=len(self.excluded) - 1)
        return self.excluded[story] & (positions != PADDING)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return where the tokens of rows are in the file, int64 (num_rows, seq_len), or `PADDING`.

        Args:
            rows: Numbers of sequences in the order in which the run reads them, from 0: row r of step s is
                s x batch_size + r, int64 (num_rows,).
        """
        return self._positions(*np.divmod(rows, len(self)))

    def _positions(self, epochs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        positions = np.empty((len(numbers), self.seq_len), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            windows = permute(numbers[epochs == epoch], len(self), (self.seed, epoch))
            positions[epochs == epoch] = self.token_positions(epoch, windows)
        return np.where(positions == PADDING, PADDING, positions % self.num_tokens)

    def tokens(self) -> np.ndarray:
        """Return the ids, (num_tokens,).

        Raises:
            UserError: the file is no longer the one that was opened.
        """
        return self._ids.read() if isinstance(self._ids, TokenFile) else self._ids

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Position in the file of the end-of-text token of each story, int64 (num_stories,)."""
        return document_ends(self.tokens(), self.eos_token_id)

    def _position_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Count tokens from the end-of-text token before their story, or from the start of the window."""
        columns = np.arange(self.seq_len)
        starts = np.where(input_ids == self.eos_token_id, columns, 0)
        return columns - np.maximum.accumulate(starts, axis=1)


def _file_identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns

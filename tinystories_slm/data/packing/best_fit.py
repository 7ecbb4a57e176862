"""Packing `best_fit`: whole stories share windows, with little padding."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinystories_slm.data.packing.dataset import IGNORED_LABEL, PADDING, PackedDataset

logger = logging.getLogger(__name__)


class Bins(NamedTuple):
    """Bins of at most `capacity` tokens, and the pieces of text in each."""

    bins: np.ndarray
    """Bin of each piece, int64 (num_pieces,), in the order of the lengths that were packed."""
    num_bins: int


class BestFitPacking(PackedDataset):
    """Windows of whole stories, with padding at their ends (Ding et al., arXiv 2404.10830).

    A story of `seq_len` tokens or more is cut into full windows and a rest, which starts a window. Other
    stories go, the longest first, into the window with the least room that suffices. A window starts with the
    end-of-text token before its first story, or the token before its rest. An epoch predicts every token
    exactly once; labels of padding are ignored. Stories of equal length exchange their windows in each epoch.
    """

    def __init__(self, source: Path | np.ndarray, **options: Any) -> None:
        super().__init__(source, **options)
        self._plan = _Plan(self.document_ends, self.seq_len - 1)
        self.padding_share = 1 - self.num_predicted / (len(self) * (self.seq_len - 1))
        """Share of the tokens of the windows that is padding."""
        logger.info(
            "packing best_fit: %s windows, %.2f %% padding", f"{len(self):,}", 100 * self.padding_share
        )
        self._pieces_of_epoch = lru_cache(maxsize=2)(self._plan.pieces)  # two: a batch may end an epoch

    @property
    def num_predicted(self) -> int:
        """Number of tokens that an epoch predicts: all up to the last end-of-text token."""
        return int(self.document_ends[-1]) + 1

    def __len__(self) -> int:
        return self._plan.num_full + self._plan.num_bins

    def token_positions(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        previous, lengths, offsets = self._pieces_of_epoch(self.seed, epoch)
        positions = np.full((len(windows), self.seq_len), PADDING, dtype=np.int64)
        for row, window in zip(positions, windows.tolist(), strict=True):
            first, last = offsets[window : window + 2]
            row[0] = previous[first] % self.num_tokens
            column = 1
            for before, length in zip(
                previous[first:last].tolist(), lengths[first:last].tolist(), strict=True
            ):
                row[column : column + length] = np.arange(before + 1, before + 1 + length)
                column += length
        return positions

    def labels(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        labels = super().labels(input_ids, positions)
        return np.where(positions == PADDING, IGNORED_LABEL, labels)


class _Plan:
    """Windows of an epoch by the lengths of the stories alone; 28 bytes per story.

    `capacity` is the number of tokens that a window predicts. The first `num_full` windows hold one piece of
    `capacity` tokens each; the others are bins, which start with the rest of a long story if there is one.
    """

    def __init__(self, ends: np.ndarray, capacity: int) -> None:
        previous = np.concatenate([[-1], ends[:-1]])  # the token before each story
        lengths = ends - previous  # with the end-of-text token
        num_full, rests = lengths // capacity, lengths % capacity
        is_long = num_full > 0
        index = np.arange(num_full.sum()) - np.repeat(np.cumsum(num_full) - num_full, num_full)
        self._full_previous = np.repeat(previous, num_full) + index * capacity
        has_rest = is_long & (rests > 0)
        # Pieces in bins: rests first, then whole stories, each from long to short.
        self._rests = np.flatnonzero(has_rest)
        self._wholes = np.flatnonzero(~is_long)
        rest_previous = (previous + num_full * capacity)[self._rests]
        self._previous = np.concatenate([rest_previous, previous[self._wholes]])
        self._lengths = np.concatenate([rests[self._rests], lengths[self._wholes]])
        self._by_length = np.argsort(-lengths[self._wholes], kind="stable") + len(self._rests)
        bins = pack_best_fit(self._lengths[: len(self._rests)], self._lengths[self._by_length], capacity)
        self.num_full, self.num_bins, self._capacity = len(self._full_previous), bins.num_bins, capacity
        self._bins = np.concatenate([np.arange(len(self._rests)), bins.bins])
        # Pieces sorted by bin; within a bin the rest stays first.
        self._by_bin = np.argsort(self._bins, kind="stable")

    def pieces(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pieces of all windows of an epoch.

        Returns:
            The position in the file before each piece and its number of tokens, (num_pieces,), and the first
            piece of each window, (num_windows + 1,).
        """
        rng = np.random.default_rng([seed, epoch])
        lengths = self._lengths[self._by_length]
        shuffled = np.lexsort((rng.random(len(lengths)), -lengths))
        order = np.concatenate([np.arange(len(self._rests)), self._by_length[shuffled]])[self._by_bin]
        counts = np.bincount(self._bins, minlength=self.num_bins)
        previous = np.concatenate([self._full_previous, self._previous[order]])
        full_lengths = np.full(self.num_full, self._capacity)
        offsets = np.concatenate([np.arange(self.num_full), self.num_full + np.cumsum([0, *counts])])
        return previous, np.concatenate([full_lengths, self._lengths[order]]), offsets


def pack_best_fit(rests: np.ndarray, lengths: np.ndarray, capacity: int) -> Bins:
    """Assign pieces to bins, each to the bin with the least room that suffices, or to a new one.

    Pieces of equal length are assigned together, so the time grows with the number of different lengths and
    not with the number of pieces.

    Args:
        rests: Lengths of pieces that each open a bin: piece i opens bin i; each at most `capacity`.
        lengths: Lengths of the other pieces, from long to short, int64 (num_pieces,); each at most
            `capacity`.
        capacity: Room of an empty bin.

    Returns:
        The bins of `lengths`.
    """
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # groups of bins by their room

    def add(free: int, group: np.ndarray) -> None:
        if len(group):
            room[free].append(group)

    for free in np.unique(capacity - rests).tolist():
        add(free, np.flatnonzero(capacity - rests == free))
    bins, num_bins, done = np.empty(len(lengths), dtype=np.int64), len(rests), 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            free = next((free for free in range(length, capacity) if room[free]), capacity)
            # A bin takes as many of these pieces as fit: its room stays the least that suffices.
            per_bin = free // length
            num_used = -(-(end - done) // per_bin)
            if not room[free]:  # free is the capacity: open new bins
                add(free, np.arange(num_bins, num_bins + num_used))
                num_bins += num_used
            used, left = np.split(room[free].pop(), [num_used])
            add(free, left)
            placed = np.repeat(used, per_bin)[: end - done]
            bins[done : done + len(placed)] = placed
            add(free - per_bin * length, used[:-1])
            add(free - (len(placed) - per_bin * (len(used) - 1)) * length, used[-1:])
            done += len(placed)
    return Bins(bins, num_bins)

"""Packing `document`: each window starts with a story."""

from functools import cached_property

import numpy as np

from tinystories_slm.data.packing.dataset import PackedDataset
from tinystories_slm.data.packing.permutation import draw


class DocumentPacking(PackedDataset):
    """Windows that start with a story, as generation does, and continue into the next one.

    A window starts with the end-of-text token before a story. A story of `seq_len` tokens or more gets
    further windows; each starts with the last token of the window before it, so every token is predicted at
    least once. Late tokens of a window occur again in the next one. One window in eight, redrawn each epoch,
    omits its first token, so that the model also learns prompts without the end-of-text token.
    """

    def __len__(self) -> int:
        return len(self._starts)

    def token_positions(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        is_shifted = draw(windows, (self.seed, epoch)) % np.uint64(8) == 0
        return (self._starts[windows] + is_shifted)[:, None] + np.arange(self.seq_len)

    @cached_property
    def _starts(self) -> np.ndarray:
        """First token of each window in the order of the file, int64 (num_windows,), 8 bytes per window."""
        ends = self.document_ends
        # The file is a ring: its last end-of-text token precedes its first story.
        firsts = np.concatenate([[-1], ends[:-1]])
        stride = self.seq_len - 1  # a window predicts all of its tokens except the first
        per_story = -(-(ends - firsts) // stride)
        index_in_story = np.arange(per_story.sum()) - np.repeat(np.cumsum(per_story) - per_story, per_story)
        return (np.repeat(firsts, per_story) + index_in_story * stride) % self.num_tokens

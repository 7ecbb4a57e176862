"""Packing `contiguous`: windows tile the token file."""

import numpy as np

from tinystories_slm.data.packing.dataset import PackedDataset
from tinystories_slm.data.packing.permutation import draw


class ContiguousPacking(PackedDataset):
    """Windows that tile the file, which is read as a ring.

    A window predicts all of its tokens except the first, which is the last token of the window before it. So
    an epoch predicts every token once; the last window ends in the first one, which repeats at most
    seq_len - 2 tokens. Each epoch starts at another token, so a token has a different context in every epoch.
    """

    def __len__(self) -> int:
        return -(-self.num_tokens // (self.seq_len - 1))

    def token_positions(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        [offset] = draw(np.zeros(1, np.int64), (self.seed, epoch)) % np.uint64(self.seq_len - 1)
        starts = int(offset) + windows * (self.seq_len - 1)
        return starts[:, None] + np.arange(self.seq_len)

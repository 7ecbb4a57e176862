"""Exponential moving average (EMA) of the weights: what a run with `train.ema_decay` evaluates and saves."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tinystories_slm.model import TinyStoriesForCausalLM

EMA_FILE = "average.safetensors"
"""File name in a checkpoint: the averaged weights."""


class EMA:
    """The exponential moving average of a model's weights (Polyak averaging), in float32.

    Every process has its own copy. The weights of all processes are equal, hence their averages are too,
    and each process scores its share of the validation stories. torch's AveragedModel reads a counter on
    the device at every update. Here the step is known, so an update is one foreach call.
    """

    def __init__(self, model: TinyStoriesForCausalLM, decay: float):
        """Start from the current weights of `model`, on its device."""
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: TinyStoriesForCausalLM, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 1."""
        update_ema = get_ema_multi_avg_fn(decay_at(self._decay, step))
        update_ema(list(self.model.parameters()), [p.detach().float() for p in model.parameters()], step)

    def save(self, checkpoint: Path) -> None:
        """Write the averaged weights into the directory `checkpoint`."""
        save_model(self.model, str(checkpoint / EMA_FILE))

    def load(self, checkpoint: Path) -> None:
        """Read the averaged weights from the directory `checkpoint`."""
        load_model(self.model, str(checkpoint / EMA_FILE))


def decay_at(decay: float, step: int) -> float:
    """Return the decay at optimizer step `step`, lower at first so that the initial weights vanish early.

    The average covers about a ninth of the steps so far, until that equals 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))

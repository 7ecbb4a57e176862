"""The running average of a run's weights, which is what `train.ema_decay` evaluates and gives away."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tinystories_slm.model import TinyStoriesForCausalLM

AVERAGE = "average.safetensors"
"""In a checkpoint: the averaged weights."""


class WeightAverage:
    """The exponential moving average of a model's weights (Polyak averaging), in float32.

    Every process of a launch keeps one: their weights are equal, so are the averages, and each scores its
    share of the validation stories. torch's AveragedModel is not used for it asks its own counter, on the
    device, at every update; the step is known, and one foreach call, on any device, is all there is to do.
    """

    def __init__(self, model: TinyStoriesForCausalLM, decay: float):
        """Begin with the weights that `model` has now, on its device."""
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: TinyStoriesForCausalLM, step: int) -> None:
        """Take in the weights after optimizer step `step`, the first being 1."""
        average = get_ema_multi_avg_fn(decay_at(self._decay, step))
        average(list(self.model.parameters()), [p.detach().float() for p in model.parameters()], step)

    def save(self, checkpoint: Path) -> None:
        save_model(self.model, str(checkpoint / AVERAGE))

    def load(self, checkpoint: Path) -> None:
        load_model(self.model, str(checkpoint / AVERAGE))


def decay_at(decay: float, step: int) -> float:
    """The decay at optimizer step `step`: lower at first, so that the initial weights are soon forgotten.

    It averages over about a ninth of the steps so far, until that is 1 / (1 - decay) of them.
    """
    return min(decay, (1 + step) / (10 + step))

"""Exponential moving average (EMA) of the weights: what a run with `train.ema_decay` evaluates and saves."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.sharding import copy_whole, is_sharded, local_part, shard_like, unsharded_copy

EMA_FILE = "average.safetensors"
"""File name in a checkpoint: the averaged weights."""


class EMA:
    """The exponential moving average of a model's weights (Polyak averaging), in float32.

    Every process has its own copy, or under FSDP2 the average of its shards. The weights of all processes are
    equal, hence their averages are too, and each process scores its share of the validation stories. torch's
    AveragedModel reads a counter on the device at every update. Here the step is known, so an update is one
    foreach call.
    """

    def __init__(self, model: TinyStoriesForCausalLM, decay: float):
        """Start from the current weights of `model`, on its device and not sharded."""
        self._model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.averages: list[Tensor] = list(self._model.parameters())
        """The averaged weights, in the order of `model.parameters()`."""
        self._decay = decay

    def place_like(self, model: TinyStoriesForCausalLM) -> None:
        """Move the average to the devices of `model`, and shard it as FSDP2 shards the model."""
        if is_sharded(model):
            self.averages = [
                shard_like(average, weight)
                for average, weight in zip(self.averages, model.parameters(), strict=True)
            ]
            self._model = model  # its configuration remains; the complete average is no longer held
        else:
            self._model.to(next(model.parameters()).device)

    def averaged_model(self) -> TinyStoriesForCausalLM:
        """Return a model with the averaged weights, complete; under FSDP2 every process must call this."""
        return unsharded_copy(self._model, self.averages).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: TinyStoriesForCausalLM, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 1."""
        update_ema = get_ema_multi_avg_fn(decay_at(self._decay, step))
        weights = [local_part(weight).float() for weight in model.parameters()]
        update_ema([local_part(average) for average in self.averages], weights, step)

    def load(self, checkpoint: Path) -> None:
        """Read the averaged weights from the directory `checkpoint`."""
        whole = TinyStoriesForCausalLM(self._model.config)
        load_model(whole, str(checkpoint / EMA_FILE))
        copy_whole(self.averages, whole.parameters())


def decay_at(decay: float, step: int) -> float:
    """Return the decay at optimizer step `step`, lower at first so that the initial weights vanish early.

    The average covers about a ninth of the steps so far, until that equals 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))

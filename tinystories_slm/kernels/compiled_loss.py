"""Loss for training with torch.compile: the logits' gradient in one compiled function."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tinystories_slm.model.modeling_tinystories import linear_cross_entropy


def compiled_linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """Compute the model's `linear_cross_entropy`, with the operations on logits compiled, except on a CPU.

    Uncompiled, each chunk of logits is written to memory three times, twice in float32. On a CPU, the
    function compiled by torch 2.13 ended the process (SIGABRT) in some runs of the test suite.
    """
    if hidden_states.device.type == "cpu":
        return linear_cross_entropy(hidden_states, weight, labels, num_items)
    return linear_cross_entropy(
        hidden_states, weight, labels, num_items, logit_gradient=_compiled_softmax_gradient()
    )


@functools.cache
def _compiled_softmax_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_softmax_gradient)


def _softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The model's `softmax_gradient` without a scatter, which would be a pass of its own."""
    scores = logits.float()
    log_norm = scores.logsumexp(-1, keepdim=True)  # (n, 1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets  # (n, V)
    grad = (scores - log_norm).exp() - is_target.float()
    return log_norm - scores.gather(1, targets), grad.to(logits.dtype)

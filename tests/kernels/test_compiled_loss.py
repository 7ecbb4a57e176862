from functools import partial
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from tinystories_slm.kernels.compiled_loss import _softmax_gradient
from tinystories_slm.model import modeling_tinystories
from tinystories_slm.model.modeling_tinystories import linear_cross_entropy

# The function that is compiled on a GPU, not compiled.
linear_cross_entropy_of_gpu = partial(linear_cross_entropy, logit_gradient=_softmax_gradient)


def pad_head(head: torch.Tensor) -> torch.Tensor:
    """Pad 101 rows to 128, as the model does on a GPU."""
    return F.pad(head, (0, 0, 0, 27))


def test_loss_with_a_padded_head_or_compiled_is_that_of_pytorch(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 600, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    labels = torch.randint(0, 101, (2, 600))
    labels[0, :50] = -100
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    expected_grads = torch.autograd.grad(expected, (hidden, weight))

    for pad, compute in product((pad_head, None), (linear_cross_entropy, linear_cross_entropy_of_gpu)):
        monkeypatch.setattr(modeling_tinystories, "_pad_head", pad or (lambda head: head))
        loss = compute(hidden, weight, labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for grad, expected_grad in zip(
            torch.autograd.grad(loss, (hidden, weight)), expected_grads, strict=True
        ):
            assert grad.shape == expected_grad.shape
            assert (grad - expected_grad).norm() < 1e-6 * expected_grad.norm()


def test_compiled_loss_in_bfloat16_is_as_accurate_as_uncompiled():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 600, 16), torch.randn(101, 16)
    labels = torch.randint(0, 101, (2, 600))
    expected = linear_cross_entropy(hidden, weight, labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            abs(compute(hidden, weight, labels).item() - expected)
            for compute in (linear_cross_entropy, linear_cross_entropy_of_gpu)
        ]
    assert errors[1] < 1.2 * errors[0] + 1e-6

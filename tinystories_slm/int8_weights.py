"""Matrices with 8 bits a weight and one scale a row, as `--dtype int8` uses them.

The model keeps float32 tensors with the rounded values, so every loop computes with the same weights. The CPU
kernel of a single sequence multiplies the integers with activations of 12 bits.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinystories_slm.errors import UserError

_ROWS = "_int8_rows"
_LEVELS = 127


def round_to_int8(model: PreTrainedModel) -> None:
    """Round the matrices of a float32 model, embeddings included, to 255 levels a row, in place.

    Raises:
        UserError: a matrix is in another layer than `torch.nn.Linear` or `torch.nn.Embedding`.
    """
    layers: dict[int, list[nn.Module]] = {}  # of each matrix: tied ones are rounded once
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim != 2:
                continue
            if not isinstance(module, nn.Linear | nn.Embedding):
                raise UserError(
                    f"dtype (int8): {name} is a {type(module).__name__}, and only torch.nn.Linear and "
                    "torch.nn.Embedding can be rounded; use float32 or bfloat16"
                )
            layers.setdefault(id(weight), []).append(module)
    with torch.no_grad():
        for modules in layers.values():
            levels, scales = rows = int8_rows(modules[0].weight)
            modules[0].weight.copy_(levels * scales[:, None])
            for module in modules:
                setattr(module, _ROWS, rows)


def has_int8_weights(model: PreTrainedModel) -> bool:
    """Whether `round_to_int8` has rounded the weights of `model`."""
    return any(hasattr(module, _ROWS) for module in model.modules())


def joined_int8_rows(*layers: nn.Module) -> tuple[Tensor, Tensor]:
    """Return integers (rows, columns) and scales (rows,) of one matrix with the rows of all `layers`."""
    levels, scales = zip(*(getattr(layer, _ROWS) for layer in layers), strict=True)
    return torch.cat(levels), torch.cat(scales)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (rows, columns) and scales (rows,) of a matrix; exact if it is rounded already."""
    scales = weight.detach().abs().amax(dim=1).float() / _LEVELS
    levels = (weight.detach() / scales.clamp_min(1e-30)[:, None]).round()
    return levels.to(torch.int8), scales

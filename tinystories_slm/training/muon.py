"""Muon optimizer, batched over matrices of equal shape."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinystories_slm.training.matrix_exchange import map_whole_matrices
from tinystories_slm.training.sharding import local_part


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), batched over equal shapes.

    A small model has dozens of small matrices. If they are updated one by one, most of the time is not
    spent on multiplication. `dtype` is the type of the orthogonalization. torch's is always bfloat16,
    which some processors multiply slower than float32. An update has AdamW's RMS, as with torch's
    `match_rms_adamw` (Liu et al., arXiv 2502.16982). The optimizer state, also in checkpoints, is torch's.
    Under FSDP2 each process orthogonalizes its share of the matrices (`matrix_exchange`).
    """

    def __init__(self, params, *, dtype: torch.dtype, **options) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient; `closure` is ignored."""
        for group in self.param_groups:
            weights, grads, momenta = [], [], []
            self._init_group(group, weights, grads, momenta)
            if not weights:
                continue
            is_sharded = isinstance(weights[0], DTensor)
            shapes = [weight.shape for weight in weights]
            parts, grads, momenta = (list(map(local_part, each)) for each in (weights, grads, momenta))
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            updates = [update.to(self.dtype) for update in updates]
            orthogonalize = partial(_orthogonalize, group=group)
            if is_sharded:
                updates = map_whole_matrices(orthogonalize, updates, weights)
            else:
                updates = orthogonalize(updates)
            for part, update, shape in zip(parts, updates, shapes, strict=True):
                lr = group["lr"] * 0.2 * max(shape) ** 0.5
                part.mul_(1 - group["lr"] * group["weight_decay"])
                part.add_(update, alpha=-lr)


def _orthogonalize(matrices: list[Tensor], *, group: dict[str, Any]) -> list[Tensor]:
    """Return each matrix (rows, columns) orthogonalized, with the options of the parameter group."""
    stacks = defaultdict(list)
    for i, matrix in enumerate(matrices):
        stacks[tuple(sorted(matrix.shape))].append(i)
    results = {}
    for indices in stacks.values():
        wide = [matrices[i].T if _is_tall(matrices[i]) else matrices[i] for i in indices]
        stacked = newton_schulz(
            torch.stack(wide),
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
        )
        for i, result in zip(indices, stacked, strict=True):
            results[i] = result.T if _is_tall(matrices[i]) else result
    return [results[i] for i in range(len(matrices))]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def newton_schulz(
    matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Move the singular values of each matrix (n, rows, columns >= rows) near 1 by Newton-Schulz steps."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

"""Muon optimizer, batched over matrices of equal shape."""

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), batched over equal shapes.

    A small model has dozens of small matrices. If they are updated one by one, most of the time is not
    spent on multiplication. `dtype` is the type of the orthogonalization. torch's is always bfloat16,
    which some processors multiply slower than float32. An update has AdamW's RMS, as with torch's
    `match_rms_adamw` (Liu et al., arXiv 2502.16982). The optimizer state, also in checkpoints, is torch's.
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
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            stacks = defaultdict(list)
            for weight, update in zip(weights, updates, strict=True):
                is_tall = weight.shape[0] > weight.shape[1]
                stacks[tuple(sorted(weight.shape))].append(
                    (weight.T, update.T) if is_tall else (weight, update)
                )
            for (_, longer), pairs in stacks.items():
                stacked = newton_schulz(
                    torch.stack([update for _, update in pairs]).to(self.dtype),
                    coefficients=group["ns_coefficients"],
                    steps=group["ns_steps"],
                    eps=group["eps"],
                )
                lr = group["lr"] * 0.2 * longer**0.5
                for (weight, _), update in zip(pairs, stacked, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-lr)


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

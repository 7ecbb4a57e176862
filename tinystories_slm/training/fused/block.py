"""A transformer block, forward and backward written out: products by torch, the rest by kernels.c.

Shapes as in modeling_tinystories.py; N = B T rows. Sums of the gradient over rows are kept a thread each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinystories_slm.native import address
from tinystories_slm.training.attention import QUERIES_AT_ONCE
from tinystories_slm.training.fused.kernels import GELU_TANH, Heads, Kernels


@dataclass(frozen=True)
class Architecture:
    """What is the same for every token of a block."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    activation: int
    """Of kernels.py: GELU_TANH or a gated one."""
    centered: bool
    """LayerNorm; RMSNorm else."""
    eps: float

    def heads(self, B: int, T: int, angles: tuple[Tensor, Tensor] | None, norms: list[Tensor]) -> Heads:
        """For the kernels; what it points to has to outlive it."""
        sizes = (B, T, self.num_heads, self.num_key_value_heads, self.head_dim)
        return Heads(
            *sizes, self.eps, *map(address, norms or (None, None)), *map(address, angles or (None, None))
        )


@dataclass(frozen=True)
class Matrices:
    """A block's matrices in the type of the products, those that read the same input as one."""

    qkv: Tensor  # ((H + 2 K) D, C)
    out: Tensor  # (C, H D)
    up: Tensor  # (I, C); gated (2 I, C), the gates first
    down: Tensor  # (C, I)


class Block(torch.autograd.Function):
    """x (B, T, C) to the block's result, of the same shape and type.

    What a kernel makes anew in less time than its memory is worth is not kept for backward: normed rows, and
    queries, keys and values by head.

    `norms` and `matrices` are its weights in the types that are computed with. `weights` are its parameters,
    which only their gradients are for: two norms, those of queries and keys if any, q, k, v, out, the gate if
    any, up, down.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        kernels: Kernels,
        architecture: Architecture,
        matrices: Matrices,
        angles: tuple[Tensor, Tensor] | None,
        norms: list[Tensor],
        *weights: Tensor,
    ) -> Tensor:
        B, T, C = x.shape
        a, m, (norm_1, norm_2, *head_norms) = architecture, matrices, norms
        heads = a.heads(B, T, angles, head_norms)
        x = x.reshape(-1, C).contiguous()  # (N, C)
        normed_1, stats_1 = normalize(kernels, a.centered, a.eps, x, norm_1)
        qkv = normed_1 @ m.qkv.T
        del normed_1
        q, k, v, _ = split_heads(kernels, heads, qkv)
        attended = x.new_empty(len(x), a.num_heads * a.head_dim)
        attention = []  # the weights of each block of queries
        for start, end in _query_blocks(T):
            scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))  # (B H, end - start, end)
            kernels.softmax_forward(len(scores), start, end - start, end, scores)
            kernels.heads_to_tokens(heads, start, end - start, torch.bmm(scores, v[:, :end]), attended)
            attention.append(scores)
        middle = torch.addmm(x, attended, m.out.T)
        normed_2, stats_2 = normalize(kernels, a.centered, a.eps, middle, norm_2)
        inner = normed_2 @ m.up.T
        del normed_2
        activated = x.new_empty(len(x), m.down.shape[1])
        kernels.activation_forward(a.activation, *activated.shape, inner, activated)
        ctx.save_for_backward(x, stats_1, qkv, attended, middle, stats_2, inner, *attention)
        ctx.shape, ctx.kernels, ctx.architecture, ctx.matrices = (B, T, C), kernels, a, m
        ctx.angles, ctx.norms = angles, norms
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        return torch.addmm(middle, activated, m.down.T).view(B, T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, stats_1, qkv, attended, middle, stats_2, inner, *attention = ctx.saved_tensors
        (B, T, C), kernels, a, m = ctx.shape, ctx.kernels, ctx.architecture, ctx.matrices
        norm_1, norm_2, *head_norms = ctx.norms
        heads = a.heads(B, T, ctx.angles, head_norms)
        grad = grad.reshape(-1, C).contiguous()  # (N, C)

        activated_grad = grad @ m.down
        activated, inner_grad = torch.empty_like(activated_grad), torch.empty_like(inner)
        kernels.activation_backward(
            a.activation, *activated.shape, inner, activated_grad, activated, inner_grad
        )
        down_grad = grad.T @ activated
        del activated, activated_grad
        normed, _ = normalize(kernels, a.centered, a.eps, middle, norm_2)
        up_grad = inner_grad.T @ normed
        middle_grad = grad.clone()  # autograd's, and others may look at it
        norm_2_grad = normalize_backward(
            kernels, a.centered, middle, stats_2, norm_2, inner_grad @ m.up, middle_grad
        )
        del inner_grad

        out_grad = middle_grad.T @ attended
        q, k, v, scales = split_heads(kernels, heads, qkv)
        attended_grad = torch.empty_like(q)  # (B H, T, D)
        kernels.tokens_to_heads(heads, middle_grad @ m.out, attended_grad)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # The last block of queries sees every key, so what it writes the others can add to.
        for (start, end), weights in reversed(list(zip(_query_blocks(T), attention, strict=True))):
            rows_grad = attended_grad[:, start:end]
            scores_grad = torch.bmm(rows_grad, v[:, :end].transpose(1, 2))
            kernels.softmax_backward(len(weights), start, end - start, end, weights, scores_grad)
            q_grad[:, start:end] = torch.bmm(scores_grad, k[:, :end])
            for total, left, right in (
                (k_grad, scores_grad, q[:, start:end]),
                (v_grad, weights, rows_grad),
            ):
                if end == T:
                    torch.bmm(left.transpose(1, 2), right, out=total)
                else:
                    total[:, :end] += torch.bmm(left.transpose(1, 2), right)
        qkv_grad = torch.empty_like(qkv)
        head_norm_grads = torch.zeros(torch.get_num_threads(), 2, a.head_dim)
        kernels.heads_backward(heads, qkv, scales, q_grad, k_grad, v_grad, qkv_grad, head_norm_grads)
        normed, _ = normalize(kernels, a.centered, a.eps, x, norm_1)
        qkv_weight_grad = qkv_grad.T @ normed
        norm_1_grad = normalize_backward(
            kernels, a.centered, x, stats_1, norm_1, qkv_grad @ m.qkv, middle_grad
        )

        query, key_value = a.num_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        ups = (up_grad,) if a.activation == GELU_TANH else up_grad.chunk(2)
        grads = [norm_1_grad, norm_2_grad]
        grads += head_norm_grads.sum(0).unbind() if head_norms else ()
        grads += [*qkv_weight_grad.split((query, key_value, key_value)), out_grad, *ups, down_grad]
        grads = [g.to(dtype) for g, dtype in zip(grads, ctx.weight_dtypes, strict=True)]
        return middle_grad.view(B, T, C), None, None, None, None, None, *grads


def normalize(
    kernels: Kernels, centered: bool, eps: float, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(The normed rows (N, C), their means and scales (N, 2)); `weight` (C,) is float32."""
    y, stats = torch.empty_like(x), x.new_empty(len(x), 2, dtype=torch.float32)
    kernels.norm_forward(centered, *x.shape, eps, x, weight, y, stats)
    return y, stats


def normalize_backward(
    kernels: Kernels, centered: bool, x: Tensor, stats: Tensor, weight: Tensor, grad: Tensor, total: Tensor
) -> Tensor:
    """Add the gradient of the rows to `total` (N, C), and return that of the weight, float32 (C,)."""
    weight_grads = torch.zeros(torch.get_num_threads(), x.shape[1])
    kernels.norm_backward(centered, *x.shape, x, stats, weight, grad, total, weight_grads)
    return weight_grads.sum(0)


def split_heads(kernels: Kernels, heads: Heads, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (B H, T, D) as they attend, and the scales (N, H + K) of their norms."""
    q, k, v = (qkv.new_empty(heads.B * heads.H, heads.T, heads.D) for _ in range(3))
    scales = qkv.new_empty(len(qkv), heads.H + heads.K, dtype=torch.float32)
    kernels.heads_forward(heads, qkv, q, k, v, scales)
    return q, k, v, scales


def _query_blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES_AT_ONCE, T)) for start in range(0, T, QUERIES_AT_ONCE)]

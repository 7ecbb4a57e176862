"""Forward and backward of a transformer block, written out: matrix products by torch, the rest by kernels.c.

Shapes as in modeling_tinystories.py; N = B T rows. Each thread sums its own part of a norm weight's gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinystories_slm.kernels.attention import query_blocks
from tinystories_slm.kernels.build import data_ptr
from tinystories_slm.kernels.training.bindings import GELU_TANH, Heads, Kernels


@dataclass(frozen=True)
class BlockShape:
    """Sizes and variants of a block, the same for every token."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    activation: int
    """One of bindings.py: GELU_TANH, SILU_GATED or RELU2_GATED."""
    centered: bool
    """True for LayerNorm, False for RMSNorm."""
    eps: float

    def heads(self, B: int, T: int, positions: "Positions", norms: list[Tensor]) -> Heads:
        """Return the kernels' description of attention. It holds addresses: the tensors must outlive it."""
        sizes = (B, T, self.num_heads, self.num_key_value_heads, self.head_dim)
        angles = positions.angles
        angle_rows = T if angles and len(angles[0]) > T else 0
        addresses = map(data_ptr, (*(norms or (None, None)), *(angles or (None, None))))
        return Heads(*sizes, self.eps, *addresses, angle_rows, data_ptr(positions.first_keys))


@dataclass(frozen=True)
class Positions:
    """Where the tokens of the sequences are."""

    angles: tuple[Tensor, Tensor] | None
    """Cosines and sines of the rotary angles in float32: (T, D), shared by the sequences, or (B T, D); None
    without rotary positions."""
    first_keys: Tensor | None
    """First key that each query attends to, int64 (B, T), as its story starts there; None for key 0."""


@dataclass(frozen=True)
class BlockWeights:
    """Matrices of a block in the dtype of the products; matrices with the same input are concatenated."""

    qkv: Tensor  # ((H + 2 K) D, C)
    out: Tensor  # (C, H D)
    up: Tensor  # (I, C); gated (2 I, C), the gates first
    down: Tensor  # (C, I)


class Block(torch.autograd.Function):
    """Map x (B, T, C) to the block's output, of the same shape and dtype.

    Backward recomputes normed rows, and queries, keys and values by head: a kernel recomputes them in less
    time than their memory is worth.

    `norms` and `weights` are the block's weights in the dtypes of the computation. `parameters` are its
    parameters, passed so that autograd assigns their gradients: two norms, the norms of queries and keys if
    any, q, k, v, out, the gate if any, up, down.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        kernels: Kernels,
        shape: BlockShape,
        weights: BlockWeights,
        positions: Positions,
        norms: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        B, T, C = x.shape
        norm_1, norm_2, *head_norms = norms
        heads = shape.heads(B, T, positions, head_norms)
        x = x.reshape(-1, C).contiguous()  # (N, C)
        normed_1, stats_1 = normalize(kernels, shape.centered, shape.eps, x, norm_1)
        qkv = normed_1 @ weights.qkv.T
        del normed_1
        q, k, v, _ = split_heads(kernels, heads, qkv)
        attended = x.new_empty(len(x), shape.num_heads * shape.head_dim)
        attention = []  # the attention weights of each block of queries
        for start, end in query_blocks(T):
            scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))  # (B H, end - start, end)
            kernels.softmax_forward(heads, start, end - start, end, scores)
            kernels.heads_to_tokens(heads, start, end - start, torch.bmm(scores, v[:, :end]), attended)
            attention.append(scores)
        residual_mid = torch.addmm(x, attended, weights.out.T)
        normed_2, stats_2 = normalize(kernels, shape.centered, shape.eps, residual_mid, norm_2)
        inner = normed_2 @ weights.up.T
        del normed_2
        activated = x.new_empty(len(x), weights.down.shape[1])
        kernels.activation_forward(shape.activation, *activated.shape, inner, activated)
        ctx.save_for_backward(x, stats_1, qkv, attended, residual_mid, stats_2, inner, *attention)
        ctx.input_shape, ctx.kernels, ctx.block_shape, ctx.weights = (B, T, C), kernels, shape, weights
        ctx.positions, ctx.norms = positions, norms
        ctx.parameter_dtypes = [parameter.dtype for parameter in parameters]
        return torch.addmm(residual_mid, activated, weights.down.T).view(B, T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, stats_1, qkv, attended, residual_mid, stats_2, inner, *attention = ctx.saved_tensors
        (B, T, C), kernels, shape, weights = ctx.input_shape, ctx.kernels, ctx.block_shape, ctx.weights
        norm_1, norm_2, *head_norms = ctx.norms
        heads = shape.heads(B, T, ctx.positions, head_norms)
        grad = grad.reshape(-1, C).contiguous()  # (N, C)

        residual_grad, norm_2_grad, up_grad, down_grad = _feed_forward_backward(
            kernels, shape, weights, residual_mid, stats_2, norm_2, inner, grad
        )
        out_grad = residual_grad.T @ attended
        q, k, v, scales = split_heads(kernels, heads, qkv)
        attended_grad = torch.empty_like(q)  # (B H, T, D)
        kernels.tokens_to_heads(heads, residual_grad @ weights.out, attended_grad)
        qkv_head_grads = _attention_backward(kernels, heads, q, k, v, attention, attended_grad)
        qkv_grad = torch.empty_like(qkv)
        head_norm_grads = torch.zeros(torch.get_num_threads(), 2, shape.head_dim)
        kernels.heads_backward(heads, qkv, scales, *qkv_head_grads, qkv_grad, head_norm_grads)
        normed, _ = normalize(kernels, shape.centered, shape.eps, x, norm_1)
        qkv_weight_grad = qkv_grad.T @ normed
        norm_1_grad = normalize_backward(
            kernels, shape.centered, x, stats_1, norm_1, qkv_grad @ weights.qkv, residual_grad
        )

        query, key_value = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        grads = [norm_1_grad, norm_2_grad]
        grads += head_norm_grads.sum(0).unbind() if head_norms else ()
        grads += [*qkv_weight_grad.split((query, key_value, key_value)), out_grad]
        grads += (up_grad,) if shape.activation == GELU_TANH else up_grad.chunk(2)
        grads += [down_grad]
        grads = [g.to(dtype) for g, dtype in zip(grads, ctx.parameter_dtypes, strict=True)]
        return residual_grad.view(B, T, C), None, None, None, None, None, *grads


def _feed_forward_backward(
    kernels: Kernels,
    shape: BlockShape,
    weights: BlockWeights,
    residual_mid: Tensor,
    stats: Tensor,
    norm: Tensor,
    inner: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `residual_mid` (N, C), the norm's weight, `weights.up` and `weights.down`."""
    activated_grad = grad @ weights.down
    activated, inner_grad = torch.empty_like(activated_grad), torch.empty_like(inner)
    kernels.activation_backward(
        shape.activation, *activated.shape, inner, activated_grad, activated, inner_grad
    )
    down_grad = grad.T @ activated
    del activated, activated_grad
    normed, _ = normalize(kernels, shape.centered, shape.eps, residual_mid, norm)
    up_grad = inner_grad.T @ normed
    residual_grad = grad.clone()  # autograd owns `grad`, and other nodes may read it
    norm_grad = normalize_backward(
        kernels, shape.centered, residual_mid, stats, norm, inner_grad @ weights.up, residual_grad
    )
    return residual_grad, norm_grad, up_grad, down_grad


def _attention_backward(
    kernels: Kernels,
    heads: Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: list[Tensor],
    attended_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each (B H, T, D).

    `attention` holds the attention weights of each block of queries.
    """
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    T = q.shape[1]
    # The last block of queries attends to every key: it goes first and writes, the others add.
    for (start, end), weights in reversed(list(zip(query_blocks(T), attention, strict=True))):
        rows_grad = attended_grad[:, start:end]
        scores_grad = torch.bmm(rows_grad, v[:, :end].transpose(1, 2))
        kernels.softmax_backward(heads, start, end - start, end, weights, scores_grad)
        q_grad[:, start:end] = torch.bmm(scores_grad, k[:, :end])
        for total, left, right in (
            (k_grad, scores_grad, q[:, start:end]),
            (v_grad, weights, rows_grad),
        ):
            if end == T:
                torch.bmm(left.transpose(1, 2), right, out=total)
            else:
                total[:, :end] += torch.bmm(left.transpose(1, 2), right)
    return q_grad, k_grad, v_grad


def normalize(
    kernels: Kernels, centered: bool, eps: float, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the normed rows (N, C), and their means and scales (N, 2); `weight` (C,) is float32."""
    y, stats = torch.empty_like(x), x.new_empty(len(x), 2, dtype=torch.float32)
    kernels.norm_forward(centered, *x.shape, eps, x, weight, y, stats)
    return y, stats


def normalize_backward(
    kernels: Kernels, centered: bool, x: Tensor, stats: Tensor, weight: Tensor, grad: Tensor, total: Tensor
) -> Tensor:
    """Add the gradient of the rows to `total` (N, C), and return the gradient of the weight, float32 (C,)."""
    weight_grads = torch.zeros(torch.get_num_threads(), x.shape[1])
    kernels.norm_backward(centered, *x.shape, x, stats, weight, grad, total, weight_grads)
    return weight_grads.sum(0)


def split_heads(kernels: Kernels, heads: Heads, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v (B H, T, D), normed, rotated and repeated, and the scales (N, H + K) of the norms."""
    q, k, v = (qkv.new_empty(heads.B * heads.H, heads.T, heads.D) for _ in range(3))
    scales = qkv.new_empty(len(qkv), heads.H + heads.K, dtype=torch.float32)
    kernels.heads_forward(heads, qkv, q, k, v, scales)
    return q, k, v, scales

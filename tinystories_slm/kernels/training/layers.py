"""Layers on the training kernels: blocks, final norm and loss, which `fuse` installs in a model."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinystories_slm.kernels.attention import is_first_keys, mean_attended_keys
from tinystories_slm.kernels.training import bindings
from tinystories_slm.kernels.training.bindings import Kernels, load_kernels
from tinystories_slm.kernels.training.block import (
    Block,
    BlockShape,
    BlockWeights,
    Positions,
    normalize,
    normalize_backward,
)
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model.modeling_tinystories import (
    TinyStoriesDecoderLayer,
    TinyStoriesRMSNorm,
    linear_cross_entropy,
)

_ACTIVATIONS = {
    # (gated, activation)
    (False, "gelu_pytorch_tanh"): bindings.GELU_TANH,
    (True, "silu"): bindings.SILU_GATED,
    (True, "relu2"): bindings.RELU2_GATED,
}
# Bytes of logits held at a time. More are not faster; fewer mean more chunks, each of which adds its gradient
# of the head to the total.
_LOGIT_BYTES = 2**25


def unsupported_reason(config: TinyStoriesConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Explain why the kernels cannot train this model; empty if they can."""
    if device.type != "cpu":
        return f"the kernels run on a CPU, not on {device.type}"
    if (config.has_gated_mlp, config.hidden_act) not in _ACTIVATIONS:
        return f"no kernel for {config.hidden_act}"
    if config.bias:
        return "no kernel for biases"
    if config.dropout:
        return "no kernel for dropout"
    return "" if load_kernels(dtype) else "no working C compiler"


def fuse(model: TinyStoriesForCausalLM) -> None:
    """Switch `model` to the training kernels, in place; `unsupported_reason` must be empty.

    Modules keep their names, parameters and saved form: blocks and final norm change their class, as in
    FSDP2. Outside training, and with a mask or a cache, they compute as before.
    """
    for layer in model.model.layers:
        layer.__class__ = FusedDecoderLayer
    model.model.norm.__class__ = {TinyStoriesRMSNorm: FusedRMSNorm, nn.LayerNorm: FusedLayerNorm}[
        type(model.model.norm)
    ]
    model.linear_loss = fused_linear_cross_entropy


def _cast_input(x: Tensor) -> tuple[Tensor, Kernels | None]:
    """Return `x` in the dtype of the products and the kernels for it; None if no kernel applies."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return x, None
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return x, load_kernels(x.dtype) if x.dtype in (torch.float32, torch.bfloat16) else None


# Arguments of a layer that `Block` may ignore, and the rotary angles, which it reads. Any other argument (a
# dense mask, a cache, packed lengths, `is_causal`) needs the unfused layer.
_SUPPORTED_KWARGS = {"position_embeddings", "position_ids", "use_cache", "num_items_in_batch", "shift_labels"}


class FusedDecoderLayer(TinyStoriesDecoderLayer):
    """A decoder layer that trains through `Block`."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x, kernels = _cast_input(hidden_states)
        mask = kwargs.get("attention_mask")
        first_keys = mask if is_first_keys(mask) else None
        is_supported = all(
            value is None or value is first_keys
            for name, value in kwargs.items()
            if name not in _SUPPORTED_KWARGS
        )
        if not (kernels and is_supported and self.training):
            return super().forward(hidden_states, **kwargs)
        config, attention = self.self_attn.config, self.self_attn
        shape = BlockShape(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            activation=_ACTIVATIONS[config.has_gated_mlp, config.hidden_act],
            centered=not config.has_rms_norm,
            eps=config.norm_eps,
        )
        norms = [self.input_layernorm.weight, self.post_attention_layernorm.weight]
        if config.qk_norm:
            norms += [attention.q_norm.weight, attention.k_norm.weight]
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [self.mlp.gate_proj] if self.mlp.gated else []
        linears += [self.mlp.up_proj, self.mlp.down_proj]
        matrices = [linear.weight for linear in linears]
        angles = kwargs.get("position_embeddings")
        positions = Positions(angles and tuple(_angle_rows(angle) for angle in angles), first_keys)
        return Block.apply(
            x,
            kernels,
            shape,
            _block_weights(matrices, x.dtype),
            positions,
            [norm.detach().float() for norm in norms],
            *norms,
            *matrices,
        )


def _block_weights(matrices: list[Tensor], dtype: torch.dtype) -> BlockWeights:
    """Cast the matrices to the dtype of the products, and concatenate those with the same input.

    Runs for every micro-batch. It costs a hundredth of the products, and a cache could not detect an
    optimizer step: torch's fused AdamW does not increment a tensor's version.
    """
    q, k, v, out, *ups, down = (matrix.detach().to(dtype) for matrix in matrices)
    return BlockWeights(torch.cat((q, k, v)), out, torch.cat(ups) if len(ups) > 1 else ups[0], down)


def _angle_rows(angles: Tensor) -> Tensor:
    """Return cosines or sines (1 or B, T, D) as (T or B T, D) in float32."""
    return angles.float().flatten(0, 1).contiguous()


class _Norm(torch.autograd.Function):
    """Norm x (B, T, C) by a kernel; `weight` (C,)."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Kernels, centered: bool, eps: float, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weight_32 = weight.float()
        y, stats = normalize(kernels, centered, eps, rows, weight_32)
        ctx.save_for_backward(rows, stats, weight_32)
        ctx.kernels, ctx.centered, ctx.weight_dtype = kernels, centered, weight.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, stats, weight = ctx.saved_tensors
        total, shape = torch.zeros_like(rows), grad.shape
        grad = grad.reshape(rows.shape).contiguous()
        weight_grad = normalize_backward(ctx.kernels, ctx.centered, rows, stats, weight, grad, total)
        return total.view(shape), None, None, None, weight_grad.to(ctx.weight_dtype)


class FusedRMSNorm(TinyStoriesRMSNorm):
    """RMSNorm that trains through a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        x, kernels = _cast_input(x)
        return _Norm.apply(x, kernels, False, self.eps, self.weight) if kernels else super().forward(x)


class FusedLayerNorm(nn.LayerNorm):
    """LayerNorm that trains through a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        x, kernels = _cast_input(x)
        return _Norm.apply(x, kernels, True, self.eps, self.weight) if kernels else super().forward(x)


def fused_loss_chunk_rows(vocab_size: int, width: int) -> int:
    """Rows of logits, `width` bytes a number, that the fused loss holds at a time."""
    return min(max(128, _LOGIT_BYTES // (vocab_size * width)), 1024)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The model's `_FusedLinearCrossEntropy`; a kernel replaces the logits by their gradient in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, kernels: Kernels) -> Tensor:
        head = weight.to(hidden.dtype)  # (V, C)
        max_rows = fused_loss_chunk_rows(len(head), head.element_size())
        num_rows = -(-len(hidden) // -(-len(hidden) // max_rows))  # the fewest chunks, of equal size
        chunk_logits = hidden.new_empty(num_rows, len(head))
        losses = torch.empty(len(hidden), dtype=torch.float32)
        scratch = torch.empty(torch.get_num_threads(), len(head))
        hidden_grad = torch.empty_like(hidden)
        weight_grad = None
        for rows, targets, row_losses, rows_grad in zip(
            *(x.split(num_rows) for x in (hidden, labels, losses, hidden_grad)), strict=True
        ):
            logits = torch.mm(rows, head.T, out=chunk_logits[: len(rows)])  # (n, V)
            kernels.cross_entropy(*logits.shape, logits, targets, row_losses, scratch)
            torch.mm(logits, head, out=rows_grad)
            if weight_grad is None:
                weight_grad = (logits.T @ rows).float()
            elif head.dtype == torch.float32:
                weight_grad.addmm_(logits.T, rows)
            else:
                weight_grad += logits.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = weight_grad.mul_(loss_grad).to(ctx.weight_dtype)
        return hidden_grad.mul_(loss_grad), weight_grad, None, None


def fused_linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """Compute the model's `linear_cross_entropy`, through the kernels where they apply."""
    hidden, kernels = _cast_input(hidden_states)
    if kernels is None:
        return linear_cross_entropy(hidden_states, weight, labels, num_items)
    hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    labels = labels.reshape(-1).contiguous()
    loss = _FusedLinearCrossEntropy.apply(hidden, weight, labels, kernels)
    return loss / ((labels >= 0).sum() if num_items is None else num_items)


def saved_bytes_per_token(config: TinyStoriesConfig, seq_len: int, width: int) -> float:
    """Bytes per token that the fused layers save for backward; `width` is the bytes per number, 4 or 2.

    A token has C hidden numbers, I in the feed-forward layer, q in its query heads and k in its key heads. A
    `Block` saves its input and the residual stream between its halves (2 C), the projections and the output
    of attention (2 q + 2 k), the inner results of the feed-forward layer (I, gated 2 I) and the attention
    weights (H for every attended key). The final norm saves its input (C), the loss the gradient of its input
    (C). Every norm also saves a mean and a scale in float32.
    """
    C, q = config.hidden_size, config.num_attention_heads * config.head_dim
    k, ups = config.num_key_value_heads * config.head_dim, 2 if config.has_gated_mlp else 1
    block = 2 * C + 2 * q + 2 * k + ups * config.intermediate_size
    block += config.num_attention_heads * mean_attended_keys(seq_len)
    return config.num_hidden_layers * (width * block + 4 * 4) + width * 2 * C + 4 * 2


def num_concatenated_weights(config: TinyStoriesConfig) -> int:
    """Number of weights of one block that `_block_weights` concatenates, and so copies in float32."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    ups = 2 * config.intermediate_size if config.has_gated_mlp else 0
    return config.hidden_size * (heads * config.head_dim + ups)


def fused_loss_bytes(config: TinyStoriesConfig, num_tokens: int, width: int) -> int:
    """Peak bytes of the fused loss on `num_tokens`: n rows of V logits, `width` bytes each.

    In 16 bits each chunk also makes its gradient of the head, V C, before adding it to the total in float32.
    """
    V, C = config.vocab_size, config.hidden_size
    rows = min(num_tokens, fused_loss_chunk_rows(V, width))
    return 4 * rows * V if width == 4 else width * (rows + C) * V

"""What `fuse` puts in a model's place: its blocks, its last norm and its loss."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model.modeling_tinystories import (
    TinyStoriesDecoderLayer,
    TinyStoriesRMSNorm,
    linear_cross_entropy,
)
from tinystories_slm.training.fused import kernels as fused_kernels
from tinystories_slm.training.fused.block import (
    Architecture,
    Block,
    Matrices,
    normalize,
    normalize_backward,
)
from tinystories_slm.training.fused.kernels import Kernels, load_kernels

_ACTIVATIONS = {
    ("gpt", "gelu_pytorch_tanh"): fused_kernels.GELU_TANH,
    ("modern", "silu"): fused_kernels.SILU_GATED,
    ("modern", "relu2"): fused_kernels.RELU2_GATED,
}
# Bytes of logits that are held at once. More are no faster; fewer would add a piece's gradient of the head to
# the others' more often.
_LOGIT_BYTES = 2**25


def why_not_fused(config: TinyStoriesConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model cannot be trained so, for people; empty if it can."""
    if device.type != "cpu":
        return f"the kernels are for a CPU, and this is {device.type}"
    if (config.family, config.hidden_act) not in _ACTIVATIONS:
        return f"no kernel for {config.hidden_act}"
    if config.bias:
        return "no kernel for biases"
    if config.dropout:
        return "no kernel for dropout"
    return "" if load_kernels(dtype) else "no C compiler that does it"


def fuse(model: TinyStoriesForCausalLM) -> None:
    """Let `model` train by kernels of our own, from here on; see `why_not_fused`.

    Modules keep their names, parameters and saved form: blocks and norm change their class, as FSDP2 does it,
    and do what they did before wherever they are not trained on whole windows.
    """
    for layer in model.model.layers:
        layer.__class__ = FusedDecoderLayer
    model.model.norm.__class__ = {TinyStoriesRMSNorm: FusedRMSNorm, nn.LayerNorm: FusedLayerNorm}[
        type(model.model.norm)
    ]
    model.linear_loss = fused_linear_cross_entropy


def _computed(x: Tensor) -> tuple[Tensor, Kernels | None]:
    """`x` in the type of the products, and the kernels for it; None where they are not for it."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return x, None
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return x, load_kernels(x.dtype) if x.dtype in (torch.float32, torch.bfloat16) else None


# Arguments of a layer that do not change what `Block` computes, beside the rotary angles, which it reads. Any
# other (a mask, a cache, packed lengths, `is_causal`) needs the unfused layer.
_WITHOUT_EFFECT = {"position_embeddings", "position_ids", "use_cache", "num_items_in_batch", "shift_labels"}


class FusedDecoderLayer(TinyStoriesDecoderLayer):
    """A block as `Block` computes it."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x, kernels = _computed(hidden_states)
        plain = all(value is None for name, value in kwargs.items() if name not in _WITHOUT_EFFECT)
        if not (kernels and plain and self.training):
            return super().forward(hidden_states, **kwargs)
        config, attention = self.self_attn.config, self.self_attn
        architecture = Architecture(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            activation=_ACTIVATIONS[config.family, config.hidden_act],
            centered=config.family == "gpt",
            eps=config.norm_eps,
        )
        norms = [self.input_layernorm.weight, self.post_attention_layernorm.weight]
        if config.qk_norm:
            norms += [attention.q_norm.weight, attention.k_norm.weight]
        matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices += [self.mlp.gate_proj] if self.mlp.gated else []
        matrices += [self.mlp.up_proj, self.mlp.down_proj]
        weights = [matrix.weight for matrix in matrices]
        angles = kwargs.get("position_embeddings")
        return Block.apply(
            x,
            kernels,
            architecture,
            _matrices(weights, x.dtype),
            angles and tuple(_half_of(angle) for angle in angles),
            [norm.detach().float() for norm in norms],
            *norms,
            *weights,
        )


def _matrices(weights: list[Tensor], dtype: torch.dtype) -> Matrices:
    """The matrices as the products want them.

    Made for every micro-batch: it costs a hundredth of what is computed with them, and nothing tells when an
    optimizer has changed one (torch's fused AdamW leaves a tensor's version as it was).
    """
    q, k, v, out, *ups, down = (weight.detach().to(dtype) for weight in weights)
    return Matrices(torch.cat((q, k, v)), out, torch.cat(ups) if len(ups) > 1 else ups[0], down)


def _half_of(angles: Tensor) -> Tensor:
    """Cosines or sines (1, T, D), each of which is there twice, once and in float32: (T, D / 2)."""
    return angles[0, :, : angles.shape[-1] // 2].float().contiguous()


class _Norm(torch.autograd.Function):
    """x (B, T, C) normed; `weight` (C,)."""

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Kernels, centered: bool, eps: float, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        wide = weight.float()
        y, stats = normalize(kernels, centered, eps, rows, wide)
        ctx.save_for_backward(rows, stats, wide)
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
    """RMSNorm by a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        x, kernels = _computed(x)
        return _Norm.apply(x, kernels, False, self.eps, self.weight) if kernels else super().forward(x)


class FusedLayerNorm(nn.LayerNorm):
    """LayerNorm by a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        x, kernels = _computed(x)
        return _Norm.apply(x, kernels, True, self.eps, self.weight) if kernels else super().forward(x)


def fused_rows_at_once(vocab_size: int, width: int) -> int:
    """Rows of logits, `width` bytes each, that the loss holds."""
    return min(max(128, _LOGIT_BYTES // (vocab_size * width)), 1024)


class _LinearCrossEntropy(torch.autograd.Function):
    """The model's own, with one kernel that turns logits into their gradient where they lie."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, kernels: Kernels) -> Tensor:
        head = weight.to(hidden.dtype)  # (V, C)
        most = fused_rows_at_once(len(head), head.element_size())
        num_rows = -(-len(hidden) // -(-len(hidden) // most))  # pieces of one size, as few as may be
        logits_of_piece = hidden.new_empty(num_rows, len(head))
        losses = torch.empty(len(hidden), dtype=torch.float32)
        scratch = torch.empty(torch.get_num_threads(), len(head))
        hidden_grad = torch.empty_like(hidden)
        weight_grad = None
        for rows, targets, row_losses, rows_grad in zip(
            *(x.split(num_rows) for x in (hidden, labels, losses, hidden_grad)), strict=True
        ):
            logits = torch.mm(rows, head.T, out=logits_of_piece[: len(rows)])  # (n, V)
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
    """As the model's own `linear_cross_entropy`."""
    hidden, kernels = _computed(hidden_states)
    if kernels is None:
        return linear_cross_entropy(hidden_states, weight, labels, num_items)
    hidden = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    labels = labels.reshape(-1).contiguous()
    loss = _LinearCrossEntropy.apply(hidden, weight, labels, kernels)
    return loss / ((labels >= 0).sum() if num_items is None else num_items)

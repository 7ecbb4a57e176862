"""Decoder for the models of this project: one step of a batch is a few operations.

In transformers' `generate()`, a small model spends most of a step in Python. The computation is the model's
own: `tests/generation/test_decoder.py` compares the two.
Shapes: N active sequences, C hidden size, H heads, K key-value heads, D head_dim, I intermediate size,
S cache positions, V vocabulary size.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tinystories_slm.config.command_args.generate import Backend
from tinystories_slm.int8_weights import has_int8_weights, joined_int8_rows
from tinystories_slm.kernels.build import data_ptr
from tinystories_slm.kernels.decoding import bindings as kernels
from tinystories_slm.model import CACHE_NAME, TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.model.modeling_tinystories import apply_rotary_pos_emb, rope_cos_sin


def resolve_backend(model: PreTrainedModel, requested: Backend = "auto") -> tuple[Backend, str]:
    """Return the backend for `model` and the reason why it is not a faster one.

    The order of speed is hf, torch, cpu. The result is the fastest backend that supports the model, up to
    `requested`; `auto` sets no limit. The reason is empty for cpu.
    """
    if requested == "hf":
        return "hf", "as requested"
    if reason := _decoder_unsupported_reason(model):
        return "hf", reason
    if requested == "torch":
        return "torch", "as requested"
    if reason := _kernels_unsupported_reason(model):
        return "torch", reason
    return "cpu", ""


def _decoder_unsupported_reason(model: PreTrainedModel) -> str:
    """Return why `Decoder` may compute something else than `model`; empty if it computes the same."""
    if type(model) is not TinyStoriesForCausalLM:
        return f"{type(model).__name__} is not a model class of this project"
    if {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.bfloat16}:
        return "weights are neither float32 nor bfloat16"
    if len({(parameter.dtype, parameter.device) for parameter in model.parameters()}) != 1:
        return "weights have several dtypes or are on several devices"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{name or 'the model'} has a hook"
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is not a plain torch.nn.Linear"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a replaced forward method"
    return ""


def _kernels_unsupported_reason(model: PreTrainedModel) -> str:
    """Return why the CPU kernels cannot decode `model`; empty if they can."""
    config = model.config
    if model.device.type != "cpu":
        return "the kernels need a CPU"
    if config.hidden_act not in ("gelu_pytorch_tanh", "silu"):
        return f"no kernel for {config.hidden_act}"
    if config.head_dim > kernels.MAX_HEAD_DIM:
        return f"no kernel for a head_dim above {kernels.MAX_HEAD_DIM}"
    return "" if _load_kernels(model) else "no working C compiler"


def _load_kernels(model: PreTrainedModel) -> ctypes.CDLL | None:
    return kernels.load_kernels(torch.int8 if has_int8_weights(model) else model.dtype)


def cache_bytes(config: TinyStoriesConfig, num_slots: int, capacity: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values in the cache of a `Decoder` with these arguments."""
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_slots * _rounded_capacity(capacity) * numbers_per_token * dtype.itemsize


def _rounded_capacity(capacity: int) -> int:
    return -(-capacity // kernels.LANES) * kernels.LANES


@dataclass
class _Layer:
    """Tensors of one layer; projections of the same input are joined into one matrix."""

    norm_1: Tensor
    norm_1_bias: Tensor | None
    qkv: Tensor  # ((H + 2K) D, C)
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor  # (C, H D)
    out_bias: Tensor | None
    norm_2: Tensor
    norm_2_bias: Tensor | None
    up: Tensor  # gpt2 (I, C); llama (2 I, C), the gate rows first
    up_bias: Tensor | None
    down: Tensor  # (C, I)
    down_bias: Tensor | None
    keys: Tensor  # (slots, K, S, D); for the kernels (slots, K, S / LANES, D, LANES)
    values: Tensor  # (slots, K, S, D)


class Decoder:
    """A model with its weights laid out for decoding, and a key-value cache with one slot per sequence.

    Matrices and cache have the model's dtype; residual stream and norms are float32. The constructor copies
    some of the weights: create a new decoder after the model has changed.

    Args:
        model: a model that `resolve_backend` accepts for `backend`.
        num_slots: sequences in the cache.
        capacity: tokens per slot, prompt included; rounded up to a multiple of `kernels.LANES`.
        backend: `torch` or `cpu`.
    """

    def __init__(
        self, model: TinyStoriesForCausalLM, num_slots: int, capacity: int, backend: Backend
    ) -> None:
        self.model, self.config, self.dtype = model, model.config, model.dtype
        config, device, inner = model.config, model.device, model.model
        capacity = _rounded_capacity(capacity)
        self.embedding, self.head = inner.embed_tokens.weight, model.lm_head.weight
        self.position_embedding = None if config.has_rope else inner.embed_positions.weight
        self.norm, self.norm_bias = _norm_weights(inner.norm)
        self.activation = inner.layers[0].mlp.act_fn
        self.cos = self.sin = None
        if config.has_rope:
            positions = torch.arange(capacity, device=device)[None]
            self.cos, self.sin = (table[0] for table in rope_cos_sin(config, positions, torch.float32))
        self.kernels = _load_kernels(model) if backend == "cpu" else None
        cache_shape = (num_slots, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [self._pack_layer(layer, cache_shape) for layer in inner.layers]
        if self.kernels:
            self._bind_kernel_structs(capacity)

    def _matrices(self, layer: nn.Module) -> dict[str, tuple[nn.Linear, ...]]:
        """Return the layers that each joined matrix consists of: qkv, out, up and down."""
        attention, mlp = layer.self_attn, layer.mlp
        gate = (mlp.gate_proj,) if self.config.has_gated_mlp else ()
        return {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "out": (attention.o_proj,),
            "up": (*gate, mlp.up_proj),
            "down": (mlp.down_proj,),
        }

    def _pack_layer(self, layer: nn.Module, cache_shape: tuple[int, ...]) -> _Layer:
        attention = layer.self_attn
        matrices = {name: _concat_linears(*linears) for name, linears in self._matrices(layer).items()}
        (qkv, qkv_bias), (out, out_bias), (up, up_bias), (down, down_bias) = matrices.values()
        norm_1, norm_1_bias = _norm_weights(layer.input_layernorm)
        norm_2, norm_2_bias = _norm_weights(layer.post_attention_layernorm)
        q_norm = k_norm = None
        if self.config.qk_norm:
            q_norm, k_norm = attention.q_norm.weight.float(), attention.k_norm.weight.float()
        # Not torch.empty: attention multiplies masked positions by 0, and 0 * NaN is NaN.
        keys, values = (torch.zeros(cache_shape, dtype=self.dtype, device=up.device) for _ in range(2))
        if self.kernels:
            keys = keys.view(*cache_shape[:2], -1, self.config.head_dim, kernels.LANES)
        return _Layer(
            norm_1, norm_1_bias, qkv, qkv_bias, q_norm, k_norm, out, out_bias,
            norm_2, norm_2_bias, up, up_bias, down, down_bias, keys, values,
        )  # fmt: skip

    def _bind_kernel_structs(self, capacity: int) -> None:
        """Fill the structs of kernels.c with addresses; attributes of `self` keep the tensors alive."""
        config = self.config
        half = config.head_dim // 2
        # Both halves of a RoPE table are equal, and the kernels read the first half only.
        self._rope_tables = [None if x is None else x[:, :half].contiguous() for x in (self.cos, self.sin)]
        self._layer_structs = (kernels.Layer * len(self.layers))()
        for struct, layer in zip(self._layer_structs, self.layers, strict=True):
            for name, tensor in vars(layer).items():
                if tensor is not None and name.endswith("bias"):
                    tensor = tensor.float()
                    setattr(layer, name, tensor)
                setattr(struct, name, data_ptr(tensor))
        head, head_scale = self._bind_int8_weights() if has_int8_weights(self.model) else (self.head, None)
        tensors = (
            self.embedding, self.position_embedding, *self._rope_tables, self.norm, self.norm_bias,
            head, head_scale,
        )  # fmt: skip
        self._model_struct = kernels.Model(
            len(self.layers), config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, capacity, config.has_rope,
            torch.get_num_threads(), config.norm_eps,
            *map(data_ptr, tensors), self._layer_structs,
        )  # fmt: skip
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        size = (2 + torch.get_num_threads()) * config.hidden_size + heads + 2 * config.intermediate_size
        self._scratch = torch.empty(size)
        self._logits = torch.empty(1, config.vocab_size)

    def _bind_int8_weights(self) -> tuple[Tensor, Tensor]:
        """Let the layers' structs point to integers and scales; return those of the head."""
        self._int8_weights = []
        for struct, layer in zip(self._layer_structs, self.model.model.layers, strict=True):
            for name, linears in self._matrices(layer).items():
                levels, scales = joined_int8_rows(*linears)
                setattr(struct, name, data_ptr(levels))
                setattr(struct, f"{name}_scale", data_ptr(scales))
                self._int8_weights.append((levels, scales))
        self._int8_weights.append(joined_int8_rows(self.model.lm_head))
        return self._int8_weights[-1]

    def prefill(self, token_ids: list[int], slots: Sequence[int]) -> Tensor:
        """Write the keys and values of one prompt into `slots`; return its last logits (V,).

        The model's own forward pass reads the prompt in one step.
        """
        ids = torch.tensor([token_ids], device=self.embedding.device)
        was_training = self.model.training
        self.model.eval()
        try:
            output = self.model(ids, use_cache=True, logits_to_keep=1)
        finally:
            self.model.train(was_training)
        for layer, prompt in zip(self.layers, getattr(output, CACHE_NAME).layers, strict=True):
            if self.kernels:
                padded = F.pad(prompt.keys, (0, 0, 0, -len(token_ids) % kernels.LANES))
                blocks = padded.unflatten(2, (-1, kernels.LANES)).transpose(3, 4)  # (1, K, blocks, D, LANES)
                layer.keys[slots, :, : blocks.shape[2]] = blocks
            else:
                layer.keys[slots, :, : len(token_ids)] = prompt.keys
            layer.values[slots, :, : len(token_ids)] = prompt.values
        return output.logits[0, -1].float()

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the keys and values of slot `source` over those of slot `target`."""
        for layer in self.layers:
            layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token per sequence, `token_ids` (N,) at `positions` (N,); return the next logits (N, V).

        Sequence i uses slot i, and the logits are float32. For one sequence, the `cpu` backend overwrites the
        returned tensor in the next step.
        """
        if self.kernels and len(token_ids) == 1:
            self.kernels.next_logits(
                self._model_struct,
                token_ids[0],
                positions[0],
                data_ptr(self._scratch),
                data_ptr(self._logits),
            )
            return self._logits
        device = self.embedding.device
        at = torch.tensor(positions, device=device)
        seen = max(positions) + 1  # from the lists: reading them from `at` would wait for a GPU
        mask = None
        if min(positions) + 1 < seen and not self.kernels:
            mask = (torch.arange(seen, device=device) <= at[:, None])[:, None, None]  # (N, 1, 1, S)
        x = F.embedding(torch.tensor(token_ids, device=device), self.embedding).float()  # (N, C)
        if self.position_embedding is not None:
            x += F.embedding(at, self.position_embedding)
        for index, layer in enumerate(self.layers):
            inner = self._normalize(x, layer.norm_1, layer.norm_1_bias)
            qkv = self._linear(inner, layer.qkv, layer.qkv_bias)
            if self.kernels:
                attended = self._attend_cpu(index, qkv, at)
            else:
                attended = self._attend(layer, qkv, at, seen, mask)
            x += self._linear(attended, layer.out, layer.out_bias)
            inner = self._normalize(x, layer.norm_2, layer.norm_2_bias)
            inner = self._linear(inner, layer.up, layer.up_bias)
            inner = self._activate_cpu(inner) if self.kernels else self._activate(inner)
            x += self._linear(inner, layer.down, layer.down_bias)
        return F.linear(self._normalize(x, self.norm, self.norm_bias), self.head).float()

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.config.has_rms_norm:
            x = F.rms_norm(x, weight.shape, weight, self.config.norm_eps)
        else:
            x = F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
        return x.to(self.dtype)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    def _attend_cpu(self, layer_index: int, qkv: Tensor, at: Tensor) -> Tensor:
        qkv = qkv.float()  # the kernel overwrites it
        out = torch.empty(len(at), self.config.num_attention_heads * self.config.head_dim)
        self.kernels.attend(
            self._model_struct, layer_index, len(at), data_ptr(qkv), data_ptr(at), data_ptr(out)
        )
        return out.to(self.dtype)

    def _activate_cpu(self, inner: Tensor) -> Tensor:
        out = torch.empty(len(inner), self.config.intermediate_size, dtype=self.dtype)
        self.kernels.activate(self._model_struct, len(inner), data_ptr(inner), data_ptr(out))
        return out

    def _activate(self, inner: Tensor) -> Tensor:
        if self.config.has_gated_mlp:
            gate, inner = inner.chunk(2, dim=-1)
            return self.activation(gate) * inner
        return self.activation(inner)

    def _attend(self, layer: _Layer, qkv: Tensor, at: Tensor, seen: int, mask: Tensor | None) -> Tensor:
        """Attend with `qkv` (N, (H + 2K) D) at `at` (N,) over the first `seen` positions of the cache.

        `mask` (N, 1, 1, seen) marks the positions of each sequence; None if all have `seen`.
        """
        config, count = self.config, len(at)
        qkv = qkv.view(count, -1, config.head_dim)  # (N, H + 2K, D)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        query, key, value = qkv.split(sizes, dim=1)
        if layer.q_norm is not None:
            query, key = (
                F.rms_norm(x.float(), weight.shape, weight, config.norm_eps).to(self.dtype)
                for x, weight in ((query, layer.q_norm), (key, layer.k_norm))
            )
        query = query.unsqueeze(2)  # (N, H, 1, D)
        if self.cos is not None:
            cos, sin = self.cos[at, None].to(self.dtype), self.sin[at, None].to(self.dtype)  # (N, 1, D)
            query = apply_rotary_pos_emb(query, cos, sin)
            key = apply_rotary_pos_emb(key.unsqueeze(2), cos, sin).squeeze(2)
        slots = torch.arange(count, device=at.device)
        layer.keys[slots, :, at], layer.values[slots, :, at] = key, value
        keys, values = layer.keys[:count, :, :seen], layer.values[:count, :, :seen]
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return attended.reshape(count, -1)


def _norm_weights(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = getattr(norm, "bias", None)
    return norm.weight.float(), None if bias is None else bias.float()


def _concat_linears(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of one layer that computes the concatenated outputs of `linears`."""
    weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    if linears[0].bias is None:
        return weight.contiguous(), None
    return weight.contiguous(), torch.cat([linear.bias for linear in linears])

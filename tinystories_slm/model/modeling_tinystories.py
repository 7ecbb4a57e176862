"""The TinyStories model: embedding, pre-norm transformer blocks, head.

The Hub stores this file with the weights (remote code): it imports nothing of `tinystories_slm` except the
configuration file next to it. Parameters have Llama's names: the state dict of the llama family loads into
`LlamaForCausalLM` (or `Qwen3ForCausalLM`) unchanged.

Shapes: B batch, T tokens, S tokens including the cached ones, C hidden_size, H heads, K key-value heads,
D head_dim, V vocabulary.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tinystories import TinyStoriesConfig

# transformers 5.24 renamed the key-value cache from `past_key_values` to `cache`: as an argument of
# `forward()` and of `create_causal_mask()`, as a field of every output, and as what gradient checkpointing
# clears. This constant is the name in the installed version; only it and `_resolve_cache` handle both names.
CACHE_NAME = (
    "cache"
    if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    else "past_key_values"
)

# Extra arguments that `forward()` passes to the loss, to the attention function and to the code that records
# hidden states. The last two lines belong to continuous batching (`generate_batch`).
_KNOWN_KWARGS = {
    *TransformersKwargs.__annotations__,
    *("shift_labels", "return_dict", "kernel_options"),
    *("write_index", "read_index", "logits_indices", "block_table", "logits_processor_args"),
    *("max_seqlen_q", "max_seqlen_k"),
    *(("cache",) if CACHE_NAME != "cache" else ()),
}


def _resolve_cache(cache: Cache | None, past_key_values: Cache | None, kwargs: dict) -> Cache | None:
    """Return the key-value cache, passed as `cache` or as `past_key_values`.

    Until transformers 5.23 `cache` is the paged cache of continuous batching, and the attention function
    reads it from its arguments; this function then puts it into `kwargs`.

    Raises:
        ValueError: both arguments hold a cache.
    """
    if cache is not None and CACHE_NAME != "cache":
        kwargs["cache"] = cache
        return past_key_values
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    if CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated; use `cache`", FutureWarning, stacklevel=3)
    return past_key_values


def _reject_unknown(kwargs: dict, config: TinyStoriesConfig) -> None:
    """Reject an argument that nothing reads.

    If transformers renames an argument and the model ignores it, the output changes without an error: a model
    that ignored `cache` generated each token from the last one alone. Externally registered attention
    functions (vLLM's) may declare more arguments.

    Raises:
        TypeError: `kwargs` has a name that transformers does not document and attention does not declare.
    """
    unknown = [name for name in kwargs if name not in _KNOWN_KWARGS]
    if not unknown:
        return
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    unknown = [name for name in unknown if name not in inspect.signature(attend).parameters]
    if unknown:
        raise TypeError(
            f"forward() got an unexpected keyword argument {', '.join(map(repr, unknown))}; correct its name "
            "(if transformers made the call, its version is newer than the model's code)"
        )


class TinyStoriesRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32 as in Llama."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32.to(x.dtype)).to(x.dtype)  # under autocast the weight is float32


def _norm(config: TinyStoriesConfig) -> nn.Module:
    if config.has_rms_norm:
        return TinyStoriesRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def rope_cos_sin(
    config: TinyStoriesConfig, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles (RoPE) of every position, each (B, T, D).

    Each forward computes them: a stored table would be a non-persistent buffer, which `from_pretrained`
    leaves uninitialized when it builds the model on the meta device.
    """
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float, device=position_ids.device) / config.head_dim
    )
    inverse_frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)  # (D/2,)
    angles = position_ids[..., None].float() * inverse_frequencies  # (B, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle; x is (B, heads, T, D), cos and sin (B, T, D)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Compute attention without a fused kernel; also return the attention weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # from the caller; True: attend
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TinyStoriesAttention(nn.Module):
    """Causal self-attention; `attn_implementation` names the backend."""

    def __init__(self, config: TinyStoriesConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.bias)
        self.o_proj.is_residual_projection = True
        if config.qk_norm:
            self.q_norm = TinyStoriesRMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = TinyStoriesRMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        cache = _resolve_cache(cache, past_key_values, kwargs)
        B, T, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        key = self.k_proj(hidden_states).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        value = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if position_embeddings is not None:
            query = apply_rotary_pos_emb(query, *position_embeddings)
            key = apply_rotary_pos_emb(key, *position_embeddings)
        if cache is not None:
            # The paged cache of transformers 5.24 and newer reads its indices from `kwargs`.
            options = {"kwargs": kwargs} if CACHE_NAME == "cache" else {}
            key, value = cache.update(key, value, self.layer_idx, **options)  # (B, K, S, D)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(B, T, -1).contiguous()), weights


class TinyStoriesMLP(nn.Module):
    """Feed-forward layer: GELU (gpt2 family) or SwiGLU (llama family)."""

    def __init__(self, config: TinyStoriesConfig):
        super().__init__()
        self.gated = config.has_gated_mlp
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.down_proj.is_residual_projection = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class TinyStoriesDecoderLayer(GradientCheckpointingLayer):
    """Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: TinyStoriesConfig, layer_idx: int):
        super().__init__()
        self.self_attn = TinyStoriesAttention(config, layer_idx)
        self.mlp = TinyStoriesMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        self.dropout = config.dropout

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, p=self.dropout, training=self.training)


class TinyStoriesPreTrainedModel(PreTrainedModel):
    """Base class with the attributes by which transformers loads, places, splits and initializes a model."""

    config: TinyStoriesConfig
    config_class = TinyStoriesConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TinyStoriesDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TinyStoriesDecoderLayer, "attentions": TinyStoriesAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize as GPT-2: std 0.02, for residual projections divided by sqrt(2 x layers).

        `zero_init_residual` sets residual projections to 0: every block starts as the identity (Goyal et al.,
        arXiv 1706.02677, section 5.1; for transformers Zhang et al., Fixup, arXiv 1901.09321).
        """
        super()._init_weights(module)
        # The mark is on the linear layer: transformers skips a custom module without direct parameters.
        if getattr(module, "is_residual_projection", False):
            if self.config.zero_init_residual:
                init.zeros_(module.weight)
                return
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)


class TinyStoriesModel(TinyStoriesPreTrainedModel):
    """Decoder without a head: token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config: TinyStoriesConfig):
        config.validate_architecture()  # the caller may have changed it after construction
        super().__init__(config)
        # No padding_idx: pad and end of text share an id, and torch does not train the row of padding_idx.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.has_rope:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            TinyStoriesDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = _norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the hidden states after the final norm, and the cache if `use_cache`.

        `attention_mask` is (B, S), 1 for a token and 0 for padding, or a complete (B, 1, T, S) mask.
        `position_ids` (B, T) default to the count of tokens in the mask, so that padding shifts no position.
        `cache` and `past_key_values` are two names of one argument (see `CACHE_NAME`).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; both names of the cache; in the
                gpt2 family a position past the context.
            TypeError: an argument that nothing reads.
        """
        cache = _resolve_cache(cache, past_key_values, kwargs)
        _reject_unknown(kwargs, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, C)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        positions_given = position_ids is not None
        # A paged cache holds many sequences and has no single length; its caller passes position_ids.
        num_past = 0 if cache is None or positions_given else cache.get_seq_length()
        if not positions_given:
            position_ids = self._position_ids(inputs_embeds, attention_mask, num_past)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            # create_causal_mask() searches position_ids for packed sequences, which forces a device sync.
            position_ids=position_ids if positions_given else None,
        )
        hidden_states, position_embeddings = self._block_inputs(
            inputs_embeds, position_ids, num_past, positions_given
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _block_inputs(
        self, inputs_embeds: Tensor, position_ids: Tensor, num_past: int | Tensor, positions_given: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the input of the first block, and in the llama family the rotary cosines and sines."""
        hidden_states, position_embeddings = inputs_embeds, None
        if not self.config.has_rope:
            self._check_context(position_ids, num_past, positions_given)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            # As in a model loaded in that dtype; a float32 residual stream would take twice the bytes.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        if self.config.has_rope:
            position_embeddings = rope_cos_sin(self.config, position_ids, hidden_states.dtype)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.dropout, training=self.training)
        return hidden_states, position_embeddings

    def _position_ids(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, num_past: int | Tensor
    ) -> Tensor:
        """Return the position of each token in its sequence, without left padding: (B or 1, T)."""
        seen = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + num_past  # (T,)
        if attention_mask is not None and attention_mask.ndim == 2:
            # (B, S), or wider: the mask of a static cache spans its whole length.
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen]
        return seen.unsqueeze(0)

    def _check_context(self, position_ids: Tensor, num_past: int | Tensor, positions_given: bool) -> None:
        """Reject a position without an embedding, unless reading positions would force a device sync."""
        context = self.config.max_position_embeddings
        if torch.compiler.is_compiling():
            return  # a compiled graph cannot branch on values
        if position_ids.device.type != "cpu" and (
            positions_given or not isinstance(num_past, int) or num_past + position_ids.shape[1] <= context
        ):
            return  # no device sync at each step: `generate()` checked once, at its start
        if position_ids.numel() and (needed := int(position_ids.max()) + 1) > context:
            raise ValueError(_context_overflow_message(needed, context))


def _context_overflow_message(needed: int, context: int) -> str:
    return (
        f"{needed} tokens do not fit the context of {context} (max_position_embeddings): this model has one "
        "learned embedding per position; shorten the prompt or lower max_new_tokens"
    )


_IGNORED_LABEL = -100
"""Label of a token that the loss ignores, PyTorch's default."""


LogitGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of labels (N,) under the logits `hidden @ weight.T`, in chunks of rows.

    Forward also computes the gradient of a chunk's logits (`logit_gradient`) and multiplies it by the head;
    backward only scales the results (as Liger's fused loss, arXiv 2410.10989). Products run in the dtype of
    `hidden`, sums in float32.
    `torch.nn.functional.linear_cross_entropy` takes twice as long on a CPU and rounds a bfloat16 loss.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, num_rows: int, logit_gradient: LogitGradient
    ) -> Tensor:
        head = _pad_head(weight.to(hidden.dtype))  # (V', C)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(head, dtype=torch.float32)
        for rows, targets, rows_grad in zip(
            hidden.split(num_rows), labels.split(num_rows), hidden_grad.split(num_rows), strict=True
        ):
            counted = (targets != _IGNORED_LABEL).unsqueeze(1)  # (n, 1)
            targets = targets.clamp(min=0).unsqueeze(1)
            logits = rows @ head.T  # (n, V')
            logits[:, len(weight) :].fill_(-torch.inf)
            losses, grad = logit_gradient(logits, targets)
            loss += (losses * counted).sum()
            torch.mm(grad, head, out=rows_grad)
            rows_grad.mul_(counted)
            weight_grad += grad.T @ (rows * counted)
        ctx.save_for_backward(hidden_grad, weight_grad[: len(weight)])
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        # Multiply in float32: the scaled loss gradient of fp16 training overflows fp16.
        hidden_grad = (hidden_grad * loss_grad).to(hidden_grad.dtype)
        return hidden_grad, weight_grad.mul_(loss_grad).to(ctx.weight_dtype), None, None, None


def _pad_head(head: Tensor) -> Tensor:
    """Append rows of zeros to `head` (V, C) for a multiple of 64, except on a CPU.

    A GPU multiplies 16-bit matrices by its tensor cores only if the rows are aligned: GPT-2's 50,257 logits
    are not.
    """
    return head if head.device.type == "cpu" else nn.functional.pad(head, (0, 0, 0, -len(head) % 64))


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (n, 1) of `targets` (n, 1) in float32, and the gradient (n, V) of their sum.

    The gradient is softmax(logits) - one_hot(target), in the dtype of `logits` (n, V).
    """
    grad = nn.functional.softmax(logits, dim=-1, dtype=torch.float32)
    smallest = torch.finfo(torch.float32).tiny  # a probability that underflows costs 87 nats, not inf
    losses = -grad.gather(1, targets).clamp(min=smallest).log()
    grad.scatter_add_(1, targets, grad.new_full((), -1.0).expand_as(targets))
    return losses, grad.to(logits.dtype)


def loss_chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of logits that `linear_cross_entropy` holds at a time.

    On a CPU they fit its caches; elsewhere they take at most a gigabyte in float32, and are a power of 2, so
    that the chunks of a usual batch have equal sizes.
    """
    return 512 if device_type == "cpu" else max(512, 2 ** (2**28 // vocab_size).bit_length() // 2)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: int | Tensor | None = None,
    *,
    logit_gradient: LogitGradient = softmax_gradient,
) -> Tensor:
    """Compute `cross_entropy(hidden_states @ weight.T, labels)` without holding all the logits.

    `hidden_states` (B, T, C) predict `labels` (B, T); -100 is ignored. The sum in nats is divided by
    `num_items`, by default the number of labels that are not ignored. `logit_gradient` computes
    `softmax_gradient`, perhaps faster.
    """
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # (N, C)
    labels = labels.reshape(-1).to(hidden_states.device)
    if torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
    num_rows = loss_chunk_rows(weight.shape[0], hidden_states.device.type)
    loss = _LinearCrossEntropy.apply(hidden_states, weight, labels, num_rows, logit_gradient)
    return loss / ((labels != _IGNORED_LABEL).sum() if num_items is None else num_items)


class TinyStoriesForCausalLM(TinyStoriesPreTrainedModel, GenerationMixin):
    """Causal language model: token ids (B, T) to next-token logits (B, T, V), and their loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # The loss of `loss_only`; a faster implementation may replace it.
    linear_loss = staticmethod(linear_cross_entropy)

    def __init__(self, config: TinyStoriesConfig):
        super().__init__(config)
        self.model = TinyStoriesModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not config.has_rope:
            # Default length: the context. A pipeline would otherwise request 256 new tokens.
            self.generation_config.max_length = config.max_position_embeddings
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return the logits of the token after each of `input_ids`, and the loss if `labels` are given.

        `cache` and `past_key_values` are two names of one argument (see `CACHE_NAME`).
        `labels` (B, T) are unshifted, usually equal to `input_ids`; -100 is ignored. The loss is the mean in
        nats per predicted token, or with `num_items_in_batch` the sum divided by it.
        `shift_labels` (B, T) are labels that are already shifted.
        `logits_to_keep` is the number of last positions to compute logits of (0: all), or their indices.
        `loss_only`, for training, returns the loss over all of `labels` and no logits: the logits of a whole
        batch, the largest tensor of a small model, are never stored. The loss can be differentiated once.
        """
        cache = _resolve_cache(cache, past_key_values, kwargs)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        shared = {
            CACHE_NAME: getattr(outputs, CACHE_NAME),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if loss_only and labels is not None:
            hidden_states, targets = outputs.last_hidden_state, kwargs.get("shift_labels")
            if targets is None:
                hidden_states, targets = hidden_states[:, :-1], labels[:, 1:]
            loss = self.linear_loss(
                hidden_states, self.lm_head.weight, targets, kwargs.get("num_items_in_batch")
            )
            return CausalLMOutputWithPast(loss=loss, **shared)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])  # (B, T or kept, V)
        loss = None
        if labels is not None:
            # transformers' causal loss shifts the labels by one and sums in float32.
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **shared)

    def _prepare_generated_length(self, generation_config, has_default_max_length, **kwargs):
        # A max_length equal to the context is our default: do not warn that it conflicts with max_new_tokens.
        is_default = generation_config.max_length in (None, self.config.max_position_embeddings)
        if generation_config.max_new_tokens is not None:
            has_default_max_length = has_default_max_length or is_default
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Reject, before the first token, a length past the learned positions.

        `generate()` calls this method once, the first place where both the maximum length and the positions
        of the prompts, without padding, are known.
        """
        position_ids = model_kwargs.get("position_ids")  # (B, T)
        if not self.config.has_rope and position_ids is not None:
            # The cache never holds the last token: + 1.
            num_new_tokens = max_cache_length + 1 - position_ids.shape[-1]
            num_prompt_tokens, context = int(position_ids.max()) + 1, self.config.max_position_embeddings
            if num_prompt_tokens + num_new_tokens > context:
                raise ValueError(
                    f"a prompt of {num_prompt_tokens} tokens and max_new_tokens ({num_new_tokens}): "
                    + _context_overflow_message(num_prompt_tokens + num_new_tokens, context)
                )
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


__all__ = ["TinyStoriesForCausalLM", "TinyStoriesModel", "TinyStoriesPreTrainedModel"]

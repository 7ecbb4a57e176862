"""Causal attention by plain matrix products, block by block: the fastest to train with on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tinystories_slm.model import TinyStoriesConfig

MATMUL = "matmul"
"""Name of this attention as an `attn_implementation`."""

# Forward and backward took 40 to 65 % of the time of torch's flash kernel for 256 to 1,024 tokens
# (docs/speed.md). Score memory grows quadratically; longer windows were not measured.
_MAX_SEQ_LEN = 1024
QUERY_BLOCK = 128
"""Queries in a block; a block skips the keys after its last query."""


def choose_attention(device: torch.device, seq_len: int, *, mask_across_stories: bool = False) -> str:
    """Return the `attn_implementation` that trains fastest on sequences of `seq_len` tokens.

    With `mask_across_stories` on CUDA, `flex_attention` needs no dense mask (T x T per sequence).
    """
    if device.type == "cuda" and mask_across_stories:
        return "flex_attention"
    return MATMUL if device.type == "cpu" and seq_len <= _MAX_SEQ_LEN else "sdpa"


def query_blocks(T: int) -> list[tuple[int, int]]:
    """Return the (start, end) of each block of queries of a sequence of T tokens."""
    return [(start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK)]


def matmul_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute causal self-attention of T tokens; fall back to `sdpa` for padding and cached tokens.

    query (B, H, T, D), key and value (B, K, T, D) to (B, T, H, D). The product adds the mask, and softmax
    reads and writes the dtype of the query and sums in float32: two passes over the scores.
    `attention_mask` may be the result of `causal_or_story_mask`.
    """
    B, H, T, D = query.shape
    first_keys = attention_mask if is_first_keys(attention_mask) else None
    is_unsupported = attention_mask is not first_keys or kwargs.get("is_causal") is False
    if is_unsupported or key.shape[2] != T:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    query = (query * scaling).reshape(B * H, T, D)
    key, value = key.reshape(B * H, T, D).transpose(1, 2), value.reshape(B * H, T, D)
    outputs = []
    for start, end in query_blocks(T):
        masked = query.new_full((end - start, end), float("-inf")).triu(start + 1)
        scores = torch.baddbmm(masked, query[:, start:end], key[:, :, :end])  # (B H, end - start, end)
        if first_keys is not None:
            is_before = torch.arange(end) < first_keys[:, start:end, None]  # (B, end - start, end)
            scores.view(B, H, *is_before.shape[1:]).masked_fill_(is_before[:, None], float("-inf"))
        weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
        outputs.append(weights @ value[:, :end])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2), None


def causal_or_story_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Return the mask of `matmul` attention; the arguments are those of transformers' `sdpa_mask`.

    Returns:
        None for a causal mask; for packed stories the first key of each query, int64 (B, T); a dense mask
        (B, 1, T, S) otherwise.
    """
    mask = sdpa_mask(attention_mask=attention_mask, **options)
    if mask is None or attention_mask is not None or torch.compiler.is_compiling():
        return mask
    first_keys = mask[:, 0].int().argmax(dim=-1)  # (B, T)
    keys = torch.arange(mask.shape[3], device=mask.device)
    in_story = (keys >= first_keys[..., None]) & (
        keys <= torch.arange(mask.shape[2], device=mask.device)[:, None]
    )
    return first_keys if torch.equal(mask[:, 0], in_story) and mask.shape[2] == mask.shape[3] else mask


def is_first_keys(attention_mask: Tensor | None) -> bool:
    """Whether `attention_mask` is the first key of each query, from `causal_or_story_mask`."""
    return attention_mask is not None and attention_mask.ndim == 2


def attention_bytes_per_token(
    config: TinyStoriesConfig, seq_len: int, width: int, device_type: str, attention: str
) -> float:
    """Bytes per token that the attention of one block saves for backward.

    `width` is the bytes per number of the activations: 4, or 2 in mixed precision. A token has H heads, q
    numbers in its query heads and k in its key heads.

    - A fused kernel saves queries, keys, values and the output (2 q + 2 k, `width` bytes each), and the
      log-sum-exp of the scores in float32 (H).
    - `matmul` and `eager` repeat keys and values for every query head (4 q). For every attended key they save
      the attention weight of each head (H; `width` bytes in `matmul`, 4 in `eager`), its copy after dropout
      or after the cast to 16 bits (H, `width` bytes), and the dropout mask (H).
    - With dropout `sdpa` has no fused kernel on a CPU: it runs unfused in float32.
    """
    H, q = config.num_attention_heads, config.num_attention_heads * config.head_dim
    k, has_dropout = config.num_key_value_heads * config.head_dim, config.dropout > 0
    if attention == "sdpa" and device_type == "cpu" and has_dropout:
        return 4 * 4 * q + 12 * H * seq_len
    if attention not in (MATMUL, "eager"):
        return width * (2 * q + 2 * k) + 4 * H
    keys, weight = (mean_attended_keys(seq_len), width) if attention == MATMUL else (seq_len, 4)
    score = weight + (width if has_dropout or weight != width else 0)
    score += (width if device_type == "cpu" else 1) if has_dropout else 0
    return width * 4 * q + score * H * keys


def mean_attended_keys(seq_len: int) -> float:
    """Mean number of keys per query whose scores `matmul` attention computes."""
    return sum((end - start) * end for start, end in query_blocks(seq_len)) / seq_len


AttentionInterface.register(MATMUL, matmul_attention_forward)
AttentionMaskInterface.register(MATMUL, causal_or_story_mask)

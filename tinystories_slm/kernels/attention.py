"""Causal attention by plain matrix products, block by block: the fastest to train with on a CPU."""

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


def choose_attention(device: torch.device, seq_len: int) -> str:
    """Return the `attn_implementation` that trains fastest on sequences of `seq_len` tokens."""
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
    """
    B, H, T, D = query.shape
    if attention_mask is not None or key.shape[2] != T or kwargs.get("is_causal") is False:
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
        weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
        outputs.append(weights @ value[:, :end])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2), None


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
AttentionMaskInterface.register(MATMUL, sdpa_mask)

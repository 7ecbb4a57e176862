"""The attention that trains fastest on a CPU: plain matrix products, on the seen half of the scores."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MATMUL = "matmul"
"""Its name as an `attn_implementation`."""

# Forward and backward took 40 to 65 % of the time of torch's flash kernel for 256 to 1,024 tokens
# (docs/speed.md); scores grow with the square of the window, and no longer one was measured.
_LONGEST = 1024
QUERIES_AT_ONCE = 128
"""Those of a block skip every key behind its last one."""


def choose_attention(device: torch.device, seq_len: int) -> str:
    """The `attn_implementation` that trains fastest on windows of `seq_len` tokens."""
    return MATMUL if device.type == "cpu" and seq_len <= _LONGEST else "sdpa"


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
    """Causal attention of T tokens on themselves; padding and cached tokens are left to `sdpa`.

    query (B, H, T, D), key and value (B, K, T, D) to (B, T, H, D). The mask is added inside the product
    and softmax, which sums in float32, reads and writes the type of the query: two passes over the scores.
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
    for start in range(0, T, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, T)
        unseen = query.new_full((end - start, end), float("-inf")).triu(start + 1)
        scores = torch.baddbmm(unseen, query[:, start:end], key[:, :, :end])  # (B H, end - start, end)
        weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
        outputs.append(weights @ value[:, :end])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2), None


AttentionInterface.register(MATMUL, matmul_attention_forward)
AttentionMaskInterface.register(MATMUL, sdpa_mask)

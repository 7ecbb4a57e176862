"""Estimates for a run before it starts: parameters, FLOPs, memory and disk space."""

from dataclasses import asdict, dataclass

import torch

from tinystories_slm.kernels.attention import attention_bytes_per_token, choose_attention
from tinystories_slm.kernels.training.layers import (
    fused_loss_bytes,
    num_concatenated_weights,
    saved_bytes_per_token,
)
from tinystories_slm.model import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import loss_chunk_rows

# The other files of a model folder or a checkpoint: tokenizer, model code, random states.
_FOLDER_BYTES = 500_000
_BYTES_PER_TOKENIZER_ENTRY = 60


def num_parameters(config: TinyStoriesConfig) -> int:
    """Number of parameters of the model of `config`, without building it; tied matrices count once."""
    C, L = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    norm = C * (2 if config.bias and not config.has_rms_norm else 1)
    block = _num_block_weights(config) + 2 * norm
    if config.bias:
        ups = 2 if config.has_gated_mlp else 1
        block += query + 2 * key_value + C + ups * config.intermediate_size + C
    if config.qk_norm:
        block += 2 * config.head_dim
    head = 0 if config.tie_word_embeddings else _num_head_weights(config)
    return L * block + norm + num_embedding_parameters(config) + head


def num_embedding_parameters(config: TinyStoriesConfig) -> int:
    """Number of parameters in embeddings: of tokens, and of positions if they are learned."""
    positions = 0 if config.has_rope else config.max_position_embeddings
    return (config.vocab_size + positions) * config.hidden_size


def flops_per_token(config: TinyStoriesConfig, seq_len: int) -> float:
    """Training operations per token, 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N counts the parameters in matrix products: those of the L blocks and the output head, V x C, once,
    tied or not. An embedding lookup is not a product; norms and biases are not counted. H heads of Q
    numbers attend over T = `seq_len` tokens; as in PaLM, the masked half of the scores is counted.
    Forward is one third of the total, backward two thirds.
    """
    num_multiplied = num_block_matrix_weights(config) + _num_head_weights(config)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return float(6 * num_multiplied + 12 * attention)


def num_block_matrix_weights(config: TinyStoriesConfig) -> int:
    """Number of weights in the matrices of all blocks, which Muon updates."""
    return config.num_hidden_layers * _num_block_weights(config)


def _num_block_weights(config: TinyStoriesConfig) -> int:
    """Number of weights in the matrices of one block."""
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    feed_forward = (3 if config.has_gated_mlp else 2) * config.intermediate_size
    return config.hidden_size * (2 * query + 2 * key_value + feed_forward)


def _num_head_weights(config: TinyStoriesConfig) -> int:
    """Number of weights in the matrix of the output head."""
    return config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class Memory:
    """Peak memory of training on one device, in bytes, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory_bytes(
    config: TinyStoriesConfig,
    *,
    per_device_batch_size: int,
    seq_len: int,
    precision: str,
    optimizer_bytes: int,
    averaged: bool = False,
    device_type: str = "cpu",
    attention: str | None = None,
    fused: bool = False,
) -> Memory:
    """Expected peak memory of training on one device, without the memory that Python and torch need.

    With P parameters, N of them in matrix products, B x T tokens in a micro-batch, hidden size C, a
    vocabulary of V, and w bytes a number, 4 or in mixed precision 2:

    - weights: 4 P; in mixed precision also 2 N for the 16-bit copies of the matrices, otherwise 4 bytes for
      each weight that the fused layers concatenate;
    - gradients: 4 P, which several processes exchange in place; 4 V C for the head's gradient, which the loss
      holds separately from forward to backward;
    - optimizer: `optimizer_bytes`, the state that the optimizer's entry in `training.optimizers` states;
    - ema: 4 P for the averaged weights (`train.ema_decay`);
    - activations: the tensors saved for backward (`_activation_bytes_per_token`, and with `fused`
      `kernels.training.layers.saved_bytes_per_token`);
    - logits: the peak of the loss (`_loss_bytes`, and with `fused` `fused_loss_bytes`).

    Set `fused` for blocks and loss on the CPU training kernels. `attention` is the backend, by default the
    result of `choose_attention`. `train.compile` merges operations that are counted here separately, and
    stays below the estimate.
    """
    P, V, C = num_parameters(config), config.vocab_size, config.hidden_size
    tokens = per_device_batch_size * seq_len
    mixed = precision in ("fp16", "bf16")
    width = 2 if mixed else 4
    attention = attention or choose_attention(torch.device(device_type), seq_len)
    copies = 2 * (num_block_matrix_weights(config) + _num_head_weights(config)) if mixed else 0
    if fused and not mixed:
        copies = 4 * config.num_hidden_layers * num_concatenated_weights(config)
    if fused:
        per_token = saved_bytes_per_token(config, seq_len, width)
        logits = fused_loss_bytes(config, tokens, width)
    else:
        per_token = _activation_bytes_per_token(config, seq_len, mixed, device_type, attention)
        logits = _loss_bytes(config, tokens, mixed, device_type)
    return Memory(
        weights=4 * P + copies,
        gradients=4 * P + 4 * V * C,
        optimizer=optimizer_bytes,
        ema=4 * P if averaged else 0,
        activations=round(tokens * per_token),
        logits=logits,
    )


def _loss_bytes(config: TinyStoriesConfig, num_tokens: int, mixed: bool, device_type: str) -> int:
    """Peak bytes of the model's `linear_cross_entropy` on `num_tokens`, n rows of V logits at a time.

    12 n V exist at the same time: logits, softmax, the result of the chunk before and, in mixed precision,
    the logits in float32. For small n the logits and the head's gradient of one chunk are larger:
    4 n V + 4 V C, in mixed precision 2 n V + 6 V C, as the gradient is made in 16 bits and added in float32.
    """
    V, C = config.vocab_size, config.hidden_size
    rows = min(num_tokens, loss_chunk_rows(V, device_type))
    return max(12 * rows * V, (2 * rows + 6 * C) * V if mixed else (4 * rows + 4 * C) * V)


def _activation_bytes_per_token(
    config: TinyStoriesConfig, seq_len: int, mixed: bool, device_type: str, attention: str
) -> float:
    """Bytes per token that all blocks, the final norm and the loss save for backward, without `fused`.

    With C hidden numbers, I of the feed-forward layer and w bytes a number (4, or 2 in mixed precision), a
    block saves:

    - the inner results of the feed-forward layer (2 I, gated 4 I) and the inputs of its matrices (2 C), w
      bytes each. Under autocast LayerNorm returns float32, except on a CPU: each matrix then casts its own
      copy, 4 C;
    - the input of each of its two norms (C), in float32 except for LayerNorm on a CPU; RMSNorm also saves the
      normed rows (C, w bytes), and QK-norm the same of queries and keys;
    - dropout masks, in the dtype of their input on a CPU, elsewhere one byte a number;
    - the tensors of attention (`attention_bytes_per_token`).

    After the final norm, the loss saves the gradient of its input (C).
    """
    C, width = config.hidden_size, 2 if mixed else 4
    norm_width = width if device_type == "cpu" and not config.has_rms_norm else 4
    inputs = 2 * C if config.has_rms_norm or norm_width == width else 4 * C
    norm = (norm_width + (width if config.has_rms_norm else 0)) * C
    block = width * ((4 if config.has_gated_mlp else 2) * config.intermediate_size + inputs) + 2 * norm
    block += attention_bytes_per_token(config, seq_len, width, device_type, attention)
    if config.qk_norm:
        block += (4 + width) * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    mask = (width if device_type == "cpu" else 1) * C if config.dropout > 0 else 0
    return config.num_hidden_layers * (block + 2 * mask) + mask + norm + width * C


@dataclass(frozen=True)
class Disk:
    """Disk space of a run, in bytes."""

    checkpoint: int
    """One directory of checkpoints/."""
    model_folder: int
    """best/, last/, or one directory of steps/."""
    run_folder: int
    """The run directory at its largest: the kept checkpoints, one being written, best/, last/ and steps/."""


def disk_bytes(
    config: TinyStoriesConfig,
    *,
    optimizer_bytes: int,
    num_checkpoints: int,
    num_models: int = 0,
    averaged: bool = False,
) -> Disk:
    """Expected size of a checkpoint and of the run directory.

    A checkpoint takes 4 P (8 P if averaged) and the optimizer's state; `num_checkpoints` of them are kept,
    and `num_models` model folders beside best/ and last/. A model folder takes 4 P and its tokenizer, about
    60 bytes an entry. Each also counts half a megabyte for its small files.
    """
    weights = 4 * num_parameters(config) + _FOLDER_BYTES
    checkpoint = weights + optimizer_bytes
    checkpoint += 4 * num_parameters(config) if averaged else 0
    model_folder = weights + _BYTES_PER_TOKENIZER_ENTRY * config.vocab_size
    run_folder = (num_checkpoints + 1) * checkpoint + (num_models + 2) * model_folder
    return Disk(checkpoint, model_folder, run_folder)

"""What a run will need, before it begins: operations, memory, disk; and what the device could do at most."""

import re
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from tinystories_slm.model import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import rows_at_once
from tinystories_slm.training.attention import MATMUL, QUERIES_AT_ONCE, choose_attention
from tinystories_slm.training.fused.layers import fused_rows_at_once

# What a model folder or a checkpoint holds beside numbers: tokenizer, model code, random states.
_FOLDER_BYTES = 500_000
_BYTES_PER_TOKENIZER_ENTRY = 60
_MEASURING_S = 0.1


def num_parameters(config: TinyStoriesConfig) -> int:
    """Parameters of the model that `config` describes, without building it; tied matrices count once."""
    C, L = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    norm = C * (2 if config.family == "gpt" and config.bias else 1)
    block = _block_matrices(config) + 2 * norm
    if config.bias:
        ups = 1 if config.family == "gpt" else 2
        block += query + 2 * key_value + C + ups * config.intermediate_size + C
    if config.qk_norm:
        block += 2 * config.head_dim
    head = 0 if config.tie_word_embeddings else _head(config)
    return L * block + norm + num_embedding_parameters(config) + head


def num_embedding_parameters(config: TinyStoriesConfig) -> int:
    """Those of them that are looked up: of tokens, and in the gpt family of positions."""
    positions = config.max_position_embeddings if config.family == "gpt" else 0
    return (config.vocab_size + positions) * config.hidden_size


def flops_per_token(config: TinyStoriesConfig, seq_len: int) -> float:
    """Training operations per token, 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N counts the parameters that take part in a matrix product: those of the L blocks and the output
    head, V x C, once, whether it is tied or not. Looking up an embedding is no product, and norms and
    biases are left out. H heads of Q numbers attend over T = `seq_len` tokens; as in PaLM the half of
    the scores that the causal mask hides is counted. Forward is a third of it, backward two thirds.
    """
    num_multiplied = config.num_hidden_layers * _block_matrices(config) + _head(config)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return float(6 * num_multiplied + 12 * attention)


def _block_matrices(config: TinyStoriesConfig) -> int:
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    feed_forward = (2 if config.family == "gpt" else 3) * config.intermediate_size
    return config.hidden_size * (2 * query + 2 * key_value + feed_forward)


def _joined_matrices(config: TinyStoriesConfig) -> int:
    """Parameters of a block's matrices that training/fused puts together, as they read the same input."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    ups = 0 if config.family == "gpt" else 2 * config.intermediate_size
    return config.hidden_size * (heads * config.head_dim + ups)


def _head(config: TinyStoriesConfig) -> int:
    return config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class Peak:
    """The most operations a second that one process's device can do in matrix products."""

    flops_per_second: float
    source: str
    """How the figure was come by, for people."""

    @property
    def measured(self) -> bool:
        """Whether it is what this machine reached in a moment, and not what its maker publishes."""
        return self.source.startswith("measured")


def utilisation(
    tokens_per_second: float, flops_per_token: float, peak: Peak, *, num_processes: int = 1
) -> float:
    """Model-FLOP utilisation (PaLM, appendix B): the share of the peak that went into the model, 0 to 1.

    `tokens_per_second` is of all processes together. Where the peak was measured, on a machine that
    had other work to do just then, the share can come out above 1.
    """
    return tokens_per_second * flops_per_token / (peak.flops_per_second * num_processes)


class _Published(NamedTuple):
    """Dense peaks in 10^12 operations a second, without sparsity, 16-bit sums kept in float32."""

    float32: float
    tf32: float | None
    fp16: float
    bf16: float | None


# From the makers' data sheets and architecture white papers. Order matters: the first match is taken.
_PUBLISHED = {
    r"B200": _Published(75, 1125, 2250, 2250),
    r"H200 NVL": _Published(60, 417.5, 835.5, 835.5),
    r"H200|GH200": _Published(66.9, 494.7, 989.4, 989.4),
    r"H100 NVL": _Published(60, 417.5, 835.5, 835.5),
    r"H100 PCIe": _Published(51.2, 378, 756, 756),
    r"H100": _Published(66.9, 494.7, 989.4, 989.4),
    r"A100": _Published(19.5, 156, 312, 312),
    r"A40": _Published(37.4, 74.8, 149.7, 149.7),
    r"A30": _Published(10.3, 82, 165, 165),
    r"A10": _Published(31.2, 62.5, 125, 125),
    r"L40S": _Published(91.6, 183, 362, 362),
    r"L40": _Published(90.5, 90.5, 181, 181),
    r"L4": _Published(30.3, 60, 121, 121),
    r"V100.SXM2": _Published(15.7, None, 125, None),
    r"V100.PCIE": _Published(14, None, 112, None),
    r"T4": _Published(8.1, None, 65, None),
    r"RTX 5090": _Published(104.8, 104.8, 209.5, 209.5),
    r"RTX 4090": _Published(82.6, 82.6, 165.2, 165.2),
    r"RTX 3090": _Published(35.6, 35.6, 71, 71),
    r"MI300X": _Published(163.4, 653.7, 1307.4, 1307.4),
}
_OTHER_SILICON = re.compile(r"\b(Laptop|MIG|D|Ti)\b")  # a name in the table, another chip or a part of it


def peak_flops(device: torch.device, precision: str) -> Peak:
    """The published dense peak of a known GPU, or what a short matrix product reaches here (about 0.1 s).

    `precision` is `no`, `fp16` or `bf16`, as `resolve_precision` gives it. `no` is float32, or TF32
    where torch is set to compute float32 products in it.
    """
    if device.type == "cuda" and (peak := _published_peak(torch.cuda.get_device_name(device), precision)):
        return peak
    return _measured_peak(device, precision)


def _published_peak(device_name: str, precision: str) -> Peak | None:
    column = precision
    if precision == "no":
        column = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    if _OTHER_SILICON.search(device_name):
        return None
    for pattern, published in _PUBLISHED.items():
        if re.search(rf"\b({pattern})\b", device_name):
            teraflops = getattr(published, column) or (published.float32 if column == "tf32" else None)
            if teraflops is None:
                return None
            return Peak(teraflops * 1e12, f"published dense {column} peak of {device_name}")
    return None


def _measured_peak(device: torch.device, precision: str) -> Peak:
    """The best of the products of two square matrices that fit into the measuring time.

    On a CPU of one thread's, times the threads: a product that all share is as slow as the slowest, so
    that any other program on one core would make the peak of the machine too low, by far.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        flops_per_second = product_flops(device, dtype, 4096)
        return Peak(
            flops_per_second, f"measured: 4096 x 4096 x 4096 product in {name} on this {device.type} device"
        )
    threads = torch.get_num_threads()
    flops_per_second = threads * product_flops(device, dtype, 512)
    times = "" if threads == 1 else f", times {threads}"
    return Peak(flops_per_second, f"measured: 512 x 512 x 512 product in {name} on 1 CPU thread{times}")


def product_flops(
    device: torch.device, dtype: torch.dtype, size: int, *, seconds: float = _MEASURING_S
) -> float:
    """Operations per second of the fastest of the products of two `size` x `size` matrices that fit into
    `seconds`; on a CPU of one thread's."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
        best_s = _timed_s(a, b)
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            best_s = min(best_s, _timed_s(a, b))
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best_s


def _timed_s(a: torch.Tensor, b: torch.Tensor) -> float:
    since_s = time.perf_counter()
    torch.mm(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return time.perf_counter() - since_s


@dataclass(frozen=True)
class Memory:
    """Peak memory of training, in bytes on one device, by what holds it."""

    weights: int
    gradients: int
    optimizer: int
    average: int
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
    optimizer: str,
    averaged: bool = False,
    device_type: str = "cpu",
    attention: str | None = None,
    fused: bool = False,
) -> Memory:
    """Expected peak memory of training on one device, beside what Python and torch take themselves.

    With P parameters, N of them in matrix products, B x T tokens in a micro-batch, C hidden numbers, a
    vocabulary of V, and w bytes a number, 4 or in mixed precision 2:

    - weights: 4 P, and 2 N for the 16-bit copies that mixed precision makes of the matrices, or else 4 for
      each of those that `fused` joins;
    - gradients: 4 P, which several processes exchange where they lie; 4 V C for that of the head, which the
      loss keeps apart from forward to backward;
    - optimizer: 8 P (AdamW's two moments); Muon keeps 4 instead of 8 a parameter of the blocks' matrices;
    - average: 4 P where the weights are averaged (`train.ema_decay`);
    - activations: what backward reads again, per block and token (see `_activation_bytes_per_token`);
    - logits: those of n tokens at a time (see `linear_cross_entropy`), of which 12 n V live at once:
      logits, softmax, what became of the piece before and, in mixed precision, the logits in float32.
      Where n is small, w n V and the head's gradient of one piece, 4 V C, are more; in mixed precision
      that is 6 V C, as it is made in 16 bits and added in float32. `fused` has w n V alone, which become
      their gradient where they lie, and in mixed precision 2 V C.

    `fused` is whether training/fused computes blocks and loss; `attention` is the back-end, by default the
    one that `choose_attention` takes. `train.compile` fuses what is counted here as separate and stays below.
    """
    P, V, C = num_parameters(config), config.vocab_size, config.hidden_size
    matrices = config.num_hidden_layers * _block_matrices(config)
    tokens = per_device_batch_size * seq_len
    mixed = precision in ("fp16", "bf16")
    attention = attention or choose_attention(torch.device(device_type), seq_len)
    copies = 2 * (matrices + _head(config)) if mixed else 0
    if fused and not mixed:
        copies = 4 * config.num_hidden_layers * _joined_matrices(config)
    if fused:
        per_token = _fused_activation_bytes_per_token(config, seq_len, 2 if mixed else 4)
        rows = min(tokens, fused_rows_at_once(V, 2 if mixed else 4))
        logits = 2 * (rows + C) * V if mixed else 4 * rows * V
    else:
        per_token = _activation_bytes_per_token(config, seq_len, mixed, device_type, attention)
        rows = min(tokens, rows_at_once(V, device_type))
        logits = max(12 * rows * V, (2 * rows + 6 * C) * V if mixed else (4 * rows + 4 * C) * V)
    return Memory(
        weights=4 * P + copies,
        gradients=4 * P + 4 * V * C,
        optimizer=_optimizer_bytes(config, optimizer),
        average=4 * P if averaged else 0,
        activations=round(tokens * per_token),
        logits=logits,
    )


def _optimizer_bytes(config: TinyStoriesConfig, optimizer: str) -> int:
    matrices = config.num_hidden_layers * _block_matrices(config) if optimizer == "muon" else 0
    return 8 * (num_parameters(config) - matrices) + 4 * matrices


def _activation_bytes_per_token(
    config: TinyStoriesConfig, seq_len: int, mixed: bool, device_type: str, attention: str
) -> float:
    """Of all blocks and the last norm; C hidden numbers, I of the feed-forward layer.

    A block keeps, w bytes each (4, or 2 in mixed precision): the feed-forward layer's inner results (2 I,
    gated 4 I), and the inputs of its matrices (2 C). Where autocast gives LayerNorm's result in float32,
    except on a CPU, that is one cast copy for each matrix, 4 C.
    Of each of its two norms it keeps the input (C), in float32 but for a CPU's LayerNorm, and RMSNorm
    also what it normalized (C, w bytes). QK-norm keeps the same of queries and keys. Dropout keeps masks,
    in the type of what it drops on a CPU, else one byte. For the rest see `_attention_bytes_per_token`.
    Behind the last norm the loss keeps the gradient of its result (C).
    """
    C, width = config.hidden_size, 2 if mixed else 4
    modern = config.family == "modern"
    norm_width = width if device_type == "cpu" and not modern else 4
    inputs = 2 * C if modern or norm_width == width else 4 * C
    norm = (norm_width + (width if modern else 0)) * C
    block = width * ((4 if modern else 2) * config.intermediate_size + inputs) + 2 * norm
    block += _attention_bytes_per_token(config, seq_len, width, device_type, attention)
    if config.qk_norm:
        block += (4 + width) * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    mask = (width if device_type == "cpu" else 1) * C if config.dropout > 0 else 0
    return config.num_hidden_layers * (block + 2 * mask) + mask + norm + width * C


def _fused_activation_bytes_per_token(config: TinyStoriesConfig, seq_len: int, width: int) -> float:
    """As `_activation_bytes_per_token`, where training/fused computes the blocks.

    A block keeps its input and what is between its halves (2 C); the projections and attention's result
    (2 q + 2 k), and of the feed-forward layer its inner results alone (I, gated 2 I); attention's weights (H
    for every key); and a few numbers in float32.
    """
    C, q = config.hidden_size, config.num_attention_heads * config.head_dim
    k, ups = config.num_key_value_heads * config.head_dim, 1 if config.family == "gpt" else 2
    block = 2 * C + 2 * q + 2 * k + ups * config.intermediate_size
    block += config.num_attention_heads * _mean_keys(seq_len)
    return config.num_hidden_layers * (width * block + 4 * 4) + width * 2 * C + 4 * 2


def _attention_bytes_per_token(
    config: TinyStoriesConfig, seq_len: int, width: int, device_type: str, attention: str
) -> float:
    """Of one block: H heads' scores, and q and k numbers of the query heads and the key-value heads.

    Fused kernels keep queries, keys, values and the output (2 q + 2 k, w bytes each), and of the scores
    a sum in float32 (H). Written out, keys and values are repeated for every query head (4 q), and for every
    key that a query is compared with the weights are kept (H, by `matmul` w bytes each, by `eager` 4), and
    what becomes of them by dropout or a cast to 16 bits (H, w bytes), and dropout's mask (H). With dropout
    `sdpa` has no fused kernel on a CPU, and is written out in float32.
    """
    H, q = config.num_attention_heads, config.num_attention_heads * config.head_dim
    k, drops = config.num_key_value_heads * config.head_dim, config.dropout > 0
    if attention == "sdpa" and device_type == "cpu" and drops:
        return 4 * 4 * q + 12 * H * seq_len
    if attention not in (MATMUL, "eager"):
        return width * (2 * q + 2 * k) + 4 * H
    keys, weight = (_mean_keys(seq_len), width) if attention == MATMUL else (seq_len, 4)
    score = weight + (width if drops or weight != width else 0)
    score += (width if device_type == "cpu" else 1) if drops else 0
    return width * 4 * q + score * H * keys


def _mean_keys(seq_len: int) -> float:
    """Keys that `matmul` attention computes the scores of, for the mean of `seq_len` queries."""
    ends = [min(start + QUERIES_AT_ONCE, seq_len) for start in range(0, seq_len, QUERIES_AT_ONCE)]
    begins = [0, *ends[:-1]]
    return sum((end - begin) * end for begin, end in zip(begins, ends, strict=True)) / seq_len


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    checkpoint: int
    """One folder of checkpoints/."""
    run_folder: int
    """All of a run at its largest: the checkpoints kept and one being written, best/ and last/."""


def disk_bytes(
    config: TinyStoriesConfig, *, optimizer: str, keep_checkpoints: int, averaged: bool = False
) -> Disk:
    """Expected size of a checkpoint, 4 P (8 P if averaged) and the optimizer's state, and of the run folder.

    A model folder is 4 P and its tokenizer, about 60 bytes an entry; every folder counts half a megabyte
    for the small files in it.
    """
    weights = 4 * num_parameters(config) + _FOLDER_BYTES
    checkpoint = weights + _optimizer_bytes(config, optimizer)
    checkpoint += 4 * num_parameters(config) if averaged else 0
    model_folder = weights + _BYTES_PER_TOKENIZER_ENTRY * config.vocab_size
    return Disk(checkpoint, (keep_checkpoints + 1) * checkpoint + 2 * model_folder)

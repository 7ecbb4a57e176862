"""Resolve every `auto` option for the device; docs/speed.md has the measurements behind the rules."""

from dataclasses import dataclass

import torch

from tinystories_slm.config import RunConfig, TrainArgs
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.malloc import describe_allocator
from tinystories_slm.kernels.attention import MATMUL, choose_attention
from tinystories_slm.kernels.training import unsupported_reason
from tinystories_slm.model_costs import Memory, memory_bytes
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.precision import resolve_precision

# A CPU is 4 to 7 % faster with several thousand tokens per forward pass than with one thousand. A small model
# saves few activations for backward and can use more tokens; for a larger one the memory matters more. A GPU
# needs many tokens to be busy.
_CPU_TOKENS_PER_FORWARD = (1_024, 4_096)
_CPU_ACTIVATION_BYTES = 192 * 2**20
_ACCELERATOR_TOKENS_PER_FORWARD = 32_768


@dataclass(frozen=True)
class RuntimeSettings:
    """Resolved options of one process: precision, attention, kernels, micro-batch."""

    precision: str
    """`no`, `fp16` or `bf16`, for Accelerate."""
    attention: str
    """Value of transformers' `attn_implementation`, or this project's `matmul`."""
    compiled: bool
    """Whether torch.compile compiles the blocks."""
    fused: bool
    """Whether the fused CPU kernels of `kernels.training` compute the operations between matrix products."""
    per_device_batch_size: int
    """Micro-batch: sequences per forward pass of one process."""
    num_threads: int
    """CPU threads of a matrix product; the environment variable `OMP_NUM_THREADS` sets it."""
    allocator: str
    """Description of the CPU memory allocator; see `hardware.malloc`."""

    def describe(self) -> str:
        """Return one line for the log: `micro-batch 4, matmul attention, fused CPU kernels, ...`."""
        threads = f"{self.num_threads} thread{'' if self.num_threads == 1 else 's'}"
        kernels = "fused CPU kernels" if self.fused else "compiled" if self.compiled else "not compiled"
        return (
            f"micro-batch {self.per_device_batch_size}, {self.attention} attention, {kernels}, {threads}, "
            f"malloc {self.allocator}"
        )


def resolve_runtime(config: RunConfig, device: torch.device, num_processes: int = 1) -> RuntimeSettings:
    """Resolve the options of one of `num_processes` processes, each with its own `device`.

    The process itself is not changed; `hardware.malloc.tune_malloc` sets the allocator.

    Raises:
        UserError: the device does not support an option, or the batch size is not divisible.
    """
    args = config.train
    precision = resolve_precision(args.mixed_precision, device)
    attention = resolve_attention(config, device)
    compiled = resolve_compile(args, device)
    return RuntimeSettings(
        precision=precision,
        attention=attention,
        compiled=compiled,
        fused=resolve_fused(config, device, precision=precision, attention=attention, compiled=compiled),
        per_device_batch_size=resolve_per_device_batch_size(
            config, device, precision=precision, num_processes=num_processes
        ),
        num_threads=torch.get_num_threads(),
        allocator=describe_allocator(),
    )


def resolve_attention(config: RunConfig, device: torch.device) -> str:
    """Return the attention backend: as configured, or the fastest for this sequence length if `auto`."""
    if config.train.attention != "auto":
        return config.train.attention
    data = config.data
    return choose_attention(device, data.seq_len, mask_across_stories=data.mask_across_stories)


def resolve_compile(args: TrainArgs, device: torch.device) -> bool:
    """Return whether to compile the blocks; `auto` does so on CUDA.

    On a CPU, compilation gained nothing once malloc retains freed memory. It also takes time at the start,
    and has produced nan on a CPU with AMX (torch 2.13).
    """
    return device.type == "cuda" if args.compile == "auto" else args.compile


def resolve_fused(
    config: RunConfig, device: torch.device, *, precision: str, attention: str, compiled: bool
) -> bool:
    """Return whether to use the fused CPU kernels: as configured, or wherever they work if `auto`.

    Raises:
        UserError: `train.cpu_kernels` is fused, but they do not work with the model or the device.
    """
    configured = config.train.cpu_kernels
    if configured == "torch":
        return False
    if attention != MATMUL:
        reason = f"attention is {attention}, not {MATMUL}"
    elif compiled:
        reason = "blocks are compiled"
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        reason = unsupported_reason(
            config.model_config(vocab_size=config.tokenizer.vocab_size), device, dtype
        )
    if configured == "fused" and reason:
        raise UserError(f"train.cpu_kernels (fused) cannot be used: {reason}; use auto or torch")
    return not reason


def resolve_per_device_batch_size(
    config: RunConfig, device: torch.device, *, precision: str, num_processes: int = 1
) -> int:
    """Return the micro-batch of a process: as configured, or the largest divisor that suits the device.

    Raises:
        UserError: the batch size is not a multiple of micro-batch x processes.
    """
    args = config.train
    if args.per_device_batch_size is not None:
        if args.batch_size % (args.per_device_batch_size * num_processes):
            raise UserError(
                f"train.batch_size ({args.batch_size}) must be a multiple of train.per_device_batch_size x "
                f"processes ({args.per_device_batch_size} x {num_processes}); change one of them, or launch "
                "with another --num_processes"
            )
        return args.per_device_batch_size
    if args.batch_size % num_processes:
        raise UserError(
            f"train.batch_size ({args.batch_size}) must be a multiple of the number of processes "
            f"({num_processes}); change it, or launch with another --num_processes"
        )
    share = args.batch_size // num_processes
    most = _max_tokens_per_forward(config, device, precision) // config.data.seq_len
    return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= max(1, most))


def estimate_memory(
    config: RunConfig, device: torch.device, *, precision: str, rows: int, vocab_size: int
) -> Memory:
    """Estimate the memory of training on one device with a micro-batch of `rows`; see `memory_bytes`."""
    attention, compiled = resolve_attention(config, device), resolve_compile(config.train, device)
    model_config = config.model_config(vocab_size=vocab_size)
    return memory_bytes(
        model_config,
        per_device_batch_size=rows,
        seq_len=config.data.seq_len,
        precision=precision,
        optimizer_bytes=optimizer_spec(config.train.optimizer).state_bytes(model_config),
        averaged=config.train.ema_decay is not None,
        device_type=device.type,
        attention=attention,
        fused=resolve_fused(config, device, precision=precision, attention=attention, compiled=compiled),
    )


def _max_tokens_per_forward(config: RunConfig, device: torch.device, precision: str) -> int:
    """Return the largest number of tokens per forward pass that suits the device."""
    if device.type != "cpu":
        return _ACCELERATOR_TOKENS_PER_FORWARD
    sequence = estimate_memory(
        config, device, precision=precision, rows=1, vocab_size=config.tokenizer.vocab_size
    )
    fitting = _CPU_ACTIVATION_BYTES * config.data.seq_len // sequence.activations
    least, most = _CPU_TOKENS_PER_FORWARD
    return min(max(fitting, least), most)

"""What a run is computed with: every `auto` resolved, by rules that docs/speed.md has the figures for."""

from dataclasses import dataclass

import torch

from tinystories_slm.allocator import keep_freed_memory
from tinystories_slm.config import RunConfig, TrainArgs
from tinystories_slm.errors import InputError
from tinystories_slm.training.attention import MATMUL, choose_attention
from tinystories_slm.training.fused import why_not_fused
from tinystories_slm.training.precision import resolve_precision
from tinystories_slm.training.watching.estimate import Memory, memory_bytes

# A CPU is 4 to 7 % faster with thousands of tokens at once than with one thousand. A small model keeps little
# for backward and may have them; for a larger one the memory is worth more. A GPU needs many to be busy.
_CPU_TOKENS_AT_ONCE = (1_024, 4_096)
_CPU_ACTIVATION_BYTES = 192 * 2**20
_TOKENS_AT_ONCE = 32_768


@dataclass(frozen=True)
class Settings:
    """How one process of a run computes."""

    precision: str
    """`no`, `fp16` or `bf16`, for Accelerate."""
    attention: str
    """Of transformers' `attn_implementation`, or our `matmul`."""
    compiled: bool
    """Whether torch.compile compiles the blocks."""
    fused: bool
    """Whether kernels of our own compute what lies between the matrix products; see fused/."""
    per_device_batch_size: int
    """Sequences in a forward."""
    num_threads: int
    """Of a matrix product on the CPU; set `OMP_NUM_THREADS` for another number."""
    allocator: str
    """Of the CPU's memory, for people; see `keep_freed_memory`."""

    def told(self) -> str:
        """`4 sequences at once, matmul attention, ...`, for the first lines of a run."""
        threads = f"{self.num_threads} thread{'' if self.num_threads == 1 else 's'}"
        compiled = "fused kernels" if self.fused else "compiled" if self.compiled else "not compiled"
        sequences = f"{self.per_device_batch_size} sequence{'' if self.per_device_batch_size == 1 else 's'}"
        return (
            f"{sequences} at once, {self.attention} attention, {compiled}, {threads}, memory {self.allocator}"
        )


def resolve_settings(config: RunConfig, device: torch.device, num_processes: int = 1) -> Settings:
    """The settings of one of `num_processes` processes, each on a `device` of its own.

    Raises:
        InputError: the device cannot compute so, or the batch cannot be shared out so.
    """
    args = config.train
    precision = resolve_precision(args.mixed_precision, device)
    attention = resolve_attention(config, device)
    compiled = resolve_compile(args, device)
    return Settings(
        precision=precision,
        attention=attention,
        compiled=compiled,
        fused=resolve_fused(config, device, precision=precision, attention=attention, compiled=compiled),
        per_device_batch_size=resolve_per_device_batch_size(
            config, device, precision=precision, num_processes=num_processes
        ),
        num_threads=torch.get_num_threads(),
        allocator=keep_freed_memory(),
    )


def resolve_attention(config: RunConfig, device: torch.device) -> str:
    """The back-end: as asked, or the fastest for windows of this length."""
    asked = config.train.attention
    return choose_attention(device, config.data.seq_len) if asked == "auto" else asked


def resolve_compile(args: TrainArgs, device: torch.device) -> bool:
    """Whether the blocks are compiled; `auto` compiles them on CUDA.

    On a CPU that gained nothing once freed memory is kept, costs its own time at the start, and has been
    seen to give nan where the CPU has AMX (torch 2.13).
    """
    return device.type == "cuda" if args.compile == "auto" else args.compile


def resolve_fused(
    config: RunConfig, device: torch.device, *, precision: str, attention: str, compiled: bool
) -> bool:
    """Whether kernels of our own train the model: as asked, or `auto`, wherever they can.

    Raises:
        InputError: they are asked for, and cannot.
    """
    asked = config.train.kernels
    if asked == "torch":
        return False
    if attention != MATMUL:
        reason = f"attention is {attention}, not {MATMUL}"
    elif compiled:
        reason = "blocks are compiled"
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        reason = why_not_fused(config.model_config(vocab_size=config.tokenizer.vocab_size), device, dtype)
    if asked == "fused" and reason:
        raise InputError(f"train.kernels (fused) cannot be: {reason}; use auto or torch")
    return not reason


def resolve_per_device_batch_size(
    config: RunConfig, device: torch.device, *, precision: str, num_processes: int = 1
) -> int:
    """Sequences in a forward of each process: as configured, or as many as suit the device.

    Raises:
        InputError: the batch cannot be shared out so.
    """
    args = config.train
    if args.per_device_batch_size is not None:
        if args.batch_size % (args.per_device_batch_size * num_processes):
            raise InputError(
                f"train.batch_size ({args.batch_size}) must be a multiple of train.per_device_batch_size x "
                f"processes ({args.per_device_batch_size} x {num_processes}); change either, or launch with "
                "another --num_processes"
            )
        return args.per_device_batch_size
    if args.batch_size % num_processes:
        raise InputError(
            f"train.batch_size ({args.batch_size}) must be a multiple of the processes ({num_processes}); "
            "change it, or launch with another --num_processes"
        )
    share = args.batch_size // num_processes
    most = _tokens_at_once(config, device, precision) // config.data.seq_len
    return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= max(1, most))


def expected_memory(
    config: RunConfig, device: torch.device, *, precision: str, rows: int, vocab_size: int
) -> Memory:
    """Of training on one device with `rows` sequences in a forward; see `memory_bytes`."""
    attention, compiled = resolve_attention(config, device), resolve_compile(config.train, device)
    return memory_bytes(
        config.model_config(vocab_size=vocab_size),
        per_device_batch_size=rows,
        seq_len=config.data.seq_len,
        precision=precision,
        optimizer=config.train.optimizer,
        averaged=config.train.ema_decay is not None,
        device_type=device.type,
        attention=attention,
        fused=resolve_fused(config, device, precision=precision, attention=attention, compiled=compiled),
    )


def _tokens_at_once(config: RunConfig, device: torch.device, precision: str) -> int:
    """Tokens that suit one forward, however many the batch has."""
    if device.type != "cpu":
        return _TOKENS_AT_ONCE
    sequence = expected_memory(
        config, device, precision=precision, rows=1, vocab_size=config.tokenizer.vocab_size
    )
    fitting = _CPU_ACTIVATION_BYTES * config.data.seq_len // sequence.activations
    least, most = _CPU_TOKENS_AT_ONCE
    return min(max(fitting, least), most)

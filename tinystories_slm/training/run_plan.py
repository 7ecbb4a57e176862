"""First log lines of a run: model, data, steps, memory and time."""

import logging

from accelerate import Accelerator

from tinystories_slm.config import RunConfig, TrainArgs
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.hardware.peak import PeakFlops
from tinystories_slm.io.units import format_bytes, format_duration, format_flops
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model_costs import (
    disk_bytes,
    flops_per_token,
    memory_bytes,
    num_embedding_parameters,
    num_parameters,
)
from tinystories_slm.runs.console import ETA_AFTER_STEPS
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.retention import count_kept, format_kept, max_reachable_steps
from tinystories_slm.training.runtime import RuntimeSettings
from tinystories_slm.training.schedule import (
    REFERENCE_TOKENS,
    REFERENCE_WIDTH,
    has_constant_part,
    peak_lr,
)

logger = logging.getLogger(__name__)


def log_run_plan(
    config: RunConfig,
    accelerator: Accelerator,
    runtime: RuntimeSettings,
    model_config: TinyStoriesConfig,
    manifest: Manifest,
    peak: PeakFlops,
    *,
    step: int,
) -> None:
    """Log the size of the run and its cost: tokens, epochs, memory, disk and a lower bound of the time.

    `step` is the number of finished steps. The ETA follows after `ETA_AFTER_STEPS` steps.
    """
    args = config.train
    num = num_parameters(model_config)
    num_embedding = num_embedding_parameters(model_config)
    tokens_per_step = args.batch_size * config.data.seq_len
    total_tokens = args.max_steps * tokens_per_step
    train_tokens = manifest.splits["train"]["num_tokens"]
    logger.info(
        "model: %s parameters (%s without embeddings), %s family, vocabulary %s",
        f"{num:,}", f"{num - num_embedding:,}", model_config.family, f"{model_config.vocab_size:,}",
    )  # fmt: skip
    logger.info(
        "run: %d steps of %d x %d = %s tokens, %s in total, %s",
        args.max_steps, args.batch_size, config.data.seq_len, f"{tokens_per_step:,}", f"{total_tokens:,}",
        f"of a stream, in chunks of {config.data.streaming_chunk_tokens:,}" if config.data.streaming
        else f"{total_tokens / train_tokens:.1f} epochs of the {train_tokens:,} training tokens",
    )  # fmt: skip
    lr = peak_lr(args, hidden_size=model_config.hidden_size, tokens_per_step=tokens_per_step)
    scaled = f", scaled from {args.lr:g} at width {REFERENCE_WIDTH} and {REFERENCE_TOKENS:,} tokens per step"
    logger.info(
        "learning rate: peak %.3g%s; %s, %s to %.3g",
        lr, scaled if args.lr_scaling else "", args.optimizer, args.schedule, lr * args.min_lr_rate,
    )  # fmt: skip
    logger.info(
        "processes: %d on %s, mixed precision %s, %d micro-batch%s per step%s",
        accelerator.num_processes, accelerator.device, accelerator.mixed_precision,
        accelerator.gradient_accumulation_steps,
        "" if accelerator.gradient_accumulation_steps == 1 else "es",
        f"; resumed at step {step}" if step else "",
    )  # fmt: skip
    logger.info("runtime: %s", runtime.describe())
    per_token = flops_per_token(model_config, config.data.seq_len)
    max_steps = max_reachable_steps(
        args,
        step_flops=tokens_per_step * per_token,
        flops_per_second=peak.flops_per_second * accelerator.num_processes,
    )
    _log_memory_and_disk(
        args, accelerator, runtime, model_config, seq_len=config.data.seq_len, max_steps=max_steps
    )
    lower_bound_s = (total_tokens - step * tokens_per_step) * per_token
    lower_bound_s /= peak.flops_per_second * accelerator.num_processes
    logger.info(
        "peak: %s per process (%s); run time at least %s for %s FLOP per token; ETA after %d steps",
        format_flops(peak.flops_per_second), peak.method, format_duration(lower_bound_s), f"{per_token:,.0f}",
        ETA_AFTER_STEPS,
    )  # fmt: skip


def _log_memory_and_disk(
    args: TrainArgs,
    accelerator: Accelerator,
    runtime: RuntimeSettings,
    model_config: TinyStoriesConfig,
    *,
    seq_len: int,
    max_steps: int,
) -> None:
    optimizer_bytes = optimizer_spec(args.optimizer).state_bytes(model_config)
    memory = memory_bytes(
        model_config,
        per_device_batch_size=runtime.per_device_batch_size,
        seq_len=seq_len,
        precision=accelerator.mixed_precision,
        optimizer_bytes=optimizer_bytes,
        averaged=args.ema_decay is not None,
        device_type=accelerator.device.type,
        attention=runtime.attention,
        fused=runtime.fused,
    )
    kept = count_kept(args, max_steps)
    disk = disk_bytes(
        model_config,
        optimizer_bytes=optimizer_bytes,
        averaged=args.ema_decay is not None,
        num_checkpoints=kept.checkpoints + has_constant_part(args),
        num_models=kept.models,
    )
    logger.info(
        "estimate: about %s of memory per process (%s for logits) plus torch's own, %s of disk",
        format_bytes(memory.total), format_bytes(memory.logits), format_bytes(disk.run_folder),
    )  # fmt: skip
    if kept.models:
        logger.info("kept: %s", format_kept(kept, disk, max_steps))

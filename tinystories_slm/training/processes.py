"""The processes of a launch: joining them, sharing the batch out, and deciding things together."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch.distributed import distributed_c10d

from tinystories_slm.config import RunConfig, TrainArgs
from tinystories_slm.errors import InputError
from tinystories_slm.training.settings import Settings, resolve_settings

Decision = TypeVar("Decision")

# The others wait while the first process downloads and tokenizes, then evaluates, tells stories and saves.
_PREPARED_WITHIN = timedelta(hours=12)
_ANSWER_WITHIN = timedelta(minutes=30)

# Gradients lie in the buckets that are exchanged, so that they are neither stored nor copied twice; the model
# has no buffers. Buckets are of PyTorch's 25 MB: see docs/speed.md.
_DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)


def build_accelerator(config: RunConfig, **options: Any) -> tuple[Accelerator, Settings]:
    """All processes of this launch, sharing out the batch; `options` are Accelerate's.

    Raises:
        InputError: the batch cannot be shared out so, or the processes did not find each other.
    """
    args, state = config.train, _processes()
    settings = resolve_settings(config, state.device, state.num_processes)
    if settings.precision == "fp16" and args.optimizer == "muon":
        raise InputError(
            "train.mixed_precision (fp16) scales gradients for one optimizer, and train.optimizer (muon) "
            "makes two; use bf16 or no, or adamw"
        )
    # Accelerate remembers the first precision of a process and refuses any other; a notebook, or a test,
    # trains more than one run.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.batch_size // (settings.per_device_batch_size * state.num_processes),
            sync_with_dataloader=False,
        ),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[_DDP],
        **options,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        check_shardable(args)
    return accelerator, settings


def check_shardable(args: TrainArgs) -> None:
    """Refuse what cannot be trained in pieces.

    Raises:
        InputError: with what can.
    """
    if args.optimizer == "muon":
        raise InputError(
            "train.optimizer (muon) makes two optimizers, and Accelerate's FSDP saves one; use adamw, or "
            "configs/accelerate/gpu_8_ddp.yaml"
        )
    if args.ema_decay is not None:
        raise InputError(
            f"train.ema_decay ({args.ema_decay}) averages whole weights, and FSDP keeps them in pieces; set "
            "it to null, or use configs/accelerate/gpu_8_ddp.yaml"
        )


def _processes() -> PartialState:
    """The processes of this launch.

    Accelerate joins CPU processes only where it is told to use the CPU; left alone, each of them would
    take itself for the only one and all would write to one folder.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_PREPARED_WITHIN)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes and Accelerate joined {state.num_processes}; for CPU "
            "processes set ACCELERATE_USE_CPU=1, else see `accelerate env`"
        )
    return state


def expect_answers(accelerator: Accelerator) -> None:
    """From here on a process that does not answer for half an hour is gone, and the job ends.

    Launchers end a job whose process dies; this is for a machine that is lost without a word.
    """
    if accelerator.num_processes > 1:
        distributed_c10d._set_pg_timeout(_ANSWER_WITHIN)


def main_process_first(accelerator: Accelerator, make: Callable[[], Decision]) -> Decision:
    """`make()` on the first process, then on the others; what the first is refused, all are.

    Raises:
        InputError: on every process, so that none waits for one that has gone.
    """
    made = decided_by_first(accelerator, make)
    return made if accelerator.is_main_process else make()


def decided_by_first(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What `decide()` gives the first process, on every process.

    Raises:
        InputError: on every process, so that none waits for one that has gone.
    """
    decision, refusal = None, None
    if accelerator.is_main_process:
        try:
            decision = decide()
        except InputError as error:
            refusal = str(error)
    [decision, refusal] = broadcast_object_list([decision, refusal])
    if refusal is not None:
        _leave(accelerator)
        raise InputError(refusal)
    return decision


def _leave(accelerator: Accelerator) -> None:
    """All together, else the first to go takes the connection from under the others."""
    accelerator.wait_for_everyone()
    accelerator.end_training()

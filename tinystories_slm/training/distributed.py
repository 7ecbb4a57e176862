"""Processes of a launch: initialization, distribution of the batch, and decisions of the main process."""

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
from tinystories_slm.errors import UserError
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.runtime import RuntimeSettings, resolve_runtime

Decision = TypeVar("Decision")

# During setup the other processes wait while the main process downloads and tokenizes. During training they
# wait while it evaluates, generates and saves.
_SETUP_TIMEOUT = timedelta(hours=12)
_STEP_TIMEOUT = timedelta(minutes=30)

# Gradients are views of the all-reduce buckets, so they are neither stored nor copied twice. The model has no
# buffers. The bucket size is PyTorch's 25 MB: see docs/speed.md.
_DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)


def build_accelerator(config: RunConfig, **options: Any) -> tuple[Accelerator, RuntimeSettings]:
    """Initialize the processes of this launch and derive the gradient accumulation.

    `options` are passed to `Accelerator`.

    Raises:
        UserError: the batch size is not divisible among the processes, an option does not work with the
            precision or the distribution, or Accelerate did not join all launched processes.
    """
    args, state = config.train, _init_processes()
    runtime = resolve_runtime(config, state.device, state.num_processes)
    if not optimizer_spec(args.optimizer).supports_fp16 and runtime.precision == "fp16":
        raise UserError(
            f"train.mixed_precision (fp16): does not work with train.optimizer ({args.optimizer}), as the "
            "gradient scaler supports one optimizer; set train.mixed_precision to bf16 or no, or "
            "train.optimizer to adamw"
        )
    # Accelerate keeps the first precision of a process and rejects any other. A notebook or a test trains
    # more than one run.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=runtime.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.batch_size // (runtime.per_device_batch_size * state.num_processes),
            sync_with_dataloader=False,
        ),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[_DDP],
        **options,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        check_shardable(args)
    return accelerator, runtime


def check_shardable(args: TrainArgs) -> None:
    """Check that the options work with FSDP.

    Raises:
        UserError: names the alternatives.
    """
    if not optimizer_spec(args.optimizer).supports_fsdp:
        raise UserError(
            f"train.optimizer ({args.optimizer}): does not work with FSDP, which shards matrices and saves "
            "one optimizer; use adamw, or configs/accelerate/gpu_8_ddp.yaml"
        )
    if args.ema_decay is not None:
        raise UserError(
            f"train.ema_decay ({args.ema_decay}) averages complete weights, but FSDP shards them; set it to "
            "null, or use configs/accelerate/gpu_8_ddp.yaml"
        )


def _init_processes() -> PartialState:
    """Join the processes of this launch.

    Accelerate joins CPU processes only with `cpu=True`. Otherwise each process would act as the only one,
    and all would write to the same run directory.

    Raises:
        UserError: Accelerate joined fewer processes than the launcher started.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_SETUP_TIMEOUT)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but Accelerate joined {state.num_processes}; for CPU "
            "processes set ACCELERATE_USE_CPU=1, otherwise check the output of `accelerate env`"
        )
    return state


def set_step_timeout(accelerator: Accelerator) -> None:
    """Set the collective timeout to 30 minutes: a lost machine then ends the job.

    If only a process dies, the launcher ends the job by itself.
    """
    if accelerator.num_processes > 1:
        distributed_c10d._set_pg_timeout(_STEP_TIMEOUT)


def main_process_first(accelerator: Accelerator, make: Callable[[], Decision]) -> Decision:
    """Call `make()` on the main process, then on the others, and return its result.

    Raises:
        UserError: `make` raised it on the main process; raised on every process, so that none waits.
    """
    made = broadcast_from_main(accelerator, make)
    return made if accelerator.is_main_process else make()


def broadcast_from_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Call `decide()` on the main process and return its result on every process.

    Raises:
        UserError: `decide` raised it; raised on every process, so that none waits.
    """
    decision, message = None, None
    if accelerator.is_main_process:
        try:
            decision = decide()
        except UserError as error:
            message = str(error)
    [decision, message] = broadcast_object_list([decision, message])
    if message is not None:
        _shut_down(accelerator)
        raise UserError(message)
    return decision


def _shut_down(accelerator: Accelerator) -> None:
    """End the process group on all processes at the same time.

    The first process to exit would otherwise close the connection that the others still use.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()

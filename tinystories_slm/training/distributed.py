"""Processes of a launch: initialization, distribution of the batch, decisions of the main process, end."""

import atexit
import contextlib
import faulthandler
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
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
)
from torch import nn
from torch.distributed import GradBucket, distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy

from tinystories_slm.config import RunConfig, TrainArgs
from tinystories_slm.errors import UserError
from tinystories_slm.hardware.launch_env import (
    is_launched,
    num_launched_processes,
    remove_stray_launch_variables,
)
from tinystories_slm.training.accelerate_env import (
    check_accelerate_env,
    check_sharding,
    log_overridden_settings,
    translate_accelerate_errors,
    use_cpu,
)
from tinystories_slm.training.launch_check import (
    JOIN_TIMEOUT,
    check_first_host,
    check_same_launch,
    report_waiting,
)
from tinystories_slm.training.optimizers import optimizer_spec
from tinystories_slm.training.runtime import RuntimeSettings, resolve_runtime

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision")
GradFuture = torch.futures.Future[torch.Tensor]

# During setup the other processes wait while the main process downloads and tokenizes. During training they
# wait while it evaluates, generates and saves.
_SETUP_TIMEOUT = timedelta(hours=12)
_STEP_TIMEOUT = timedelta(minutes=30)
# A process that needs longer to leave the process group than this is ended.
_LEAVE_TIMEOUT_S = 60
_wrapped_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

_REDUCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Gradients are views of the all-reduce buckets, so they are neither stored nor copied twice. The model has no
# buffers to broadcast. The bucket size is PyTorch's 25 MB: see docs/communication.md.
_DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def build_accelerator(config: RunConfig, **options: Any) -> tuple[Accelerator, RuntimeSettings]:
    """Initialize the processes of this launch and derive the gradient accumulation.

    `options` are passed to `Accelerator`.

    Raises:
        UserError: the batch size is not divisible among the processes, an option does not work with the
            precision or the distribution, Accelerate did not join all launched processes, or its own settings
            are not supported.
    """
    check_accelerate_env()
    args, state = config.train, _init_processes()
    check_same_launch(config)
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
    with translate_accelerate_errors():
        accelerator = Accelerator(
            mixed_precision=runtime.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.batch_size // (runtime.per_device_batch_size * state.num_processes),
                sync_with_dataloader=False,
            ),
            dynamo_backend="no",  # else from the environment; `prepare_to_train` compiles the blocks
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[_DDP],
            **options,
        )
    check_sharding(accelerator)
    log_overridden_settings(runtime.precision)
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = sharding_precision(args, runtime.precision)
    return accelerator, runtime


def sharding_precision(args: TrainArgs, precision: str) -> MixedPrecisionPolicy:
    """Return the data types of FSDP2: 16-bit weights are gathered in mixed precision.

    Accelerate's own policy also reduces gradients in the 16-bit type, and rounds the loss to it.
    """
    param_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=_REDUCE_DTYPES[args.reduce_dtype])


def _init_processes() -> PartialState:
    """Join the processes of this launch.

    Accelerate joins CPU processes only with `cpu=True`. Otherwise each process would act as the only one,
    and all would write to the same run directory.

    Raises:
        UserError: Accelerate joined fewer processes than the launcher started, or they cannot be joined.
    """
    _check_launch_variables()
    cpu = use_cpu() or not torch.accelerator.is_available()
    check_first_host()
    with translate_accelerate_errors(), report_waiting():
        state = PartialState(cpu=cpu, timeout=JOIN_TIMEOUT)
    if torch.distributed.is_initialized():
        # NCCL connects at the first collective operation, through the store.
        distributed_c10d._get_default_store().set_timeout(_SETUP_TIMEOUT)
        distributed_c10d._set_pg_timeout(_SETUP_TIMEOUT)
    launched = num_launched_processes()
    if state.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but Accelerate joined {state.num_processes}; for CPU "
            "processes set ACCELERATE_USE_CPU=1, otherwise check the output of `accelerate env`"
        )
    return state


def _check_launch_variables() -> None:
    """Ignore, with a warning, what a scheduler or a container left of a launch in the environment.

    Raises:
        UserError: several processes are announced, but nothing says where they meet.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if not is_launched() and size.isdigit() and int(size) > 1:
        raise UserError(
            f"WORLD_SIZE ({size}) needs RANK and MASTER_ADDR as well; start the processes with `accelerate "
            "launch`, or unset WORLD_SIZE to train in one process"
        )
    if stray := remove_stray_launch_variables():
        names = ", ".join(f"{name}={value}" for name, value in stray.items())
        logger.warning("ignored %s: not set by a launcher of this run", names)


def set_step_timeout(accelerator: Accelerator) -> None:
    """Set the collective timeout to 30 minutes: a lost machine then ends the job.

    If only a process dies, the launcher ends the job by itself.
    """
    if accelerator.num_processes > 1:
        distributed_c10d._set_pg_timeout(_STEP_TIMEOUT)


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    reduce_dtype: str = "float32",
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Wrap `model` and its optimizers for the processes of this launch."""
    prepared_model, *prepared_optimizers = accelerator.prepare(model, *optimizers)
    _wrapped_models.add(prepared_model)
    if reduce_dtype == "bfloat16" and isinstance(prepared_model, nn.parallel.DistributedDataParallel):
        prepared_model.register_comm_hook(None, _sum_in_bfloat16)
    return prepared_model, prepared_optimizers


def _sum_in_bfloat16(group: torch.distributed.ProcessGroup | None, bucket: GradBucket) -> GradFuture:
    """Sum the gradients of a bucket in bfloat16.

    DDP accepts torch's hook by its own name for NCCL and XCCL alone; gloo sums bfloat16, too.
    """
    return bf16_compress_hook(group, bucket)


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
        leave_process_group(accelerator)
        raise UserError(message)
    return decision


@contextlib.contextmanager
def process_group(accelerator: Accelerator) -> Iterator[None]:
    """Leave the process group at the end of the block; after an error, at the exit of the process."""
    try:
        yield
        leave_process_group(accelerator)
    except BaseException:
        abandon_process_group(accelerator)
        raise


def leave_process_group(accelerator: Accelerator) -> None:
    """Release what holds the process group, then destroy the group, on all processes at the same time.

    The order matters. DDP's reducer is freed with the GIL held. If it held the last reference to a gloo
    group, the group's destructor would wait, with the GIL, for a thread that needs the GIL to free the
    tensors of the last collective. If Python holds the last reference, torch (2.8 or newer) releases the GIL.

    The barrier comes first: no collective is in flight, and the first process to leave does not close a
    connection that the others still use. A process that has not left after a minute is ended.
    """
    accelerator.wait_for_everyone()
    with _end_process_after(_LEAVE_TIMEOUT_S):
        _release_models(accelerator)
        accelerator.end_training()


def abandon_process_group(accelerator: Accelerator) -> None:
    """Release what holds the process group after an error, and destroy the group at exit.

    The other processes may wait in a collective that this one does not join, so leaving may take a minute.
    At exit, the error has been printed.
    """
    _release_models(accelerator)
    if torch.distributed.is_initialized():
        atexit.register(_destroy_abandoned_group, accelerator)


def _destroy_abandoned_group(accelerator: Accelerator) -> None:
    faulthandler.dump_traceback_later(_LEAVE_TIMEOUT_S, exit=True, file=2)
    accelerator.end_training()


def _release_models(accelerator: Accelerator) -> None:
    """Drop the wrapped models and optimizers, and what DDP has of the process group.

    A frame of an exception's traceback may hold the DDP module itself, so its parts are dropped.
    """
    if not torch.distributed.is_initialized():
        return
    for model in _wrapped_models:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.logger = None  # holds the reducer
            model.reducer = None
            model.process_group = None
    accelerator.free_memory()


@contextlib.contextmanager
def _end_process_after(seconds: float) -> Iterator[None]:
    """End the process, with its stacks on stderr, if the block takes longer; needs no GIL."""
    if not torch.distributed.is_initialized():
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()

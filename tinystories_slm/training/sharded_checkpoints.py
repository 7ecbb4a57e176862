"""Sharded checkpoints: each process writes its shards of a model, in the background of the run.

`torch.distributed.checkpoint` writes one safetensors file for each process into `shards/` of the checkpoint;
nothing is unpickled. Any number of processes reads them, sharded or not.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import fsync_directory
from tinystories_slm.training.checkpoint_tensors import TrainedState

SHARDS = "shards"
"""Name of the folder in a checkpoint that holds the files of the processes."""
_WEIGHTS, _AVERAGES = "model", "average"


class CheckpointWriter:
    """Writes sharded checkpoints, one at a time, while the run goes on.

    `start` waits for the copy of this process's shards to the memory of its machine. Threads write them and
    exchange what they wrote through a process group of their own, so they do not disturb the training.
    """

    def __init__(self) -> None:
        self._writing: Future | None = None
        self._folder = Path()
        self._group: torch.distributed.ProcessGroup | None = None

    def start(self, state: TrainedState, folder: Path, complete: Callable[[], None]) -> None:
        """Copy the state and start to write it into the new `folder`; every process must call this.

        The main process calls `complete` on its thread after every process has written.
        """
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        self._folder = folder
        self._writing = dcp.async_save(
            named_tensors(state),
            storage_writer=_ShardWriter(folder / SHARDS, complete),
            process_group=self._group,
        )

    @property
    def has_failed(self) -> bool:
        """Whether the last write has ended with an error, which `wait` raises."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: a process could not write; raised on every process.
        """
        if self._writing is None:
            return
        try:
            self._writing.result()
        except CheckpointException as error:
            rank, (reason, _) = min(error.failures.items())
            text = " ".join(str(reason).split())[:200]
            raise UserError(
                f"output_dir ({self._folder.parent.parent}) can no longer be written to: process {rank}, "
                f"checkpoint {self._folder.stem}: {text}; free disk space or make the directory writable; "
                "saved files are intact; run the same command to resume"
            ) from error
        finally:
            self._writing = None

    def close(self) -> None:
        """Wait for the last checkpoint, complete or not."""
        if self._writing is not None:
            wait([self._writing])
        self._group = None


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes the shards of this process as safetensors; on the main process, `complete` is the last step.

    torch raises an error of any process, and of `complete`, on every process.
    """

    def __init__(self, folder: Path, complete: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._complete = complete

    def finish(self, metadata: dcp.Metadata, results: list) -> None:
        fsync_directory(Path(self.path))
        self._complete()


def named_tensors(state: TrainedState) -> dict[str, Tensor]:
    """Return every tensor of the state by its name in a sharded checkpoint; they share the state's memory.

    Optimizers without state get one first, of zeros; under FSDP2 every process must then call this.
    """
    tensors = _named(_WEIGHTS, state.model, list(state.model.parameters()))
    for i, optimizer in enumerate(state.optimizers):
        states = get_optimizer_state_dict(state.model, optimizer.optimizer)["state"]
        for weight, values in states.items():
            tensors |= {f"optimizer.{i}.{weight}.{name}": value for name, value in values.items()}
    if state.ema:
        tensors |= _named(_AVERAGES, state.model, state.ema.averages)
    return tensors


def read_shards(state: TrainedState, folder: Path) -> None:
    """Read a sharded checkpoint into the state, on every process.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    _read(named_tensors(state), folder)


def read_sharded_model(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Read the weights, or their averages, of a sharded checkpoint into an unsharded model."""
    _read(_named(_AVERAGES if averaged else _WEIGHTS, model, list(model.parameters())), folder)


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether the processes wrote the checkpoint in shards."""
    return (folder / SHARDS).is_dir()


def _named(prefix: str, model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in zip(names, tensors, strict=True)}


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read each tensor in place: whole, or this process's shard."""
    with warnings.catch_warnings():
        # Each process reads what it needs, without the others.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder / SHARDS)), no_dist=True)
        except CheckpointException as error:
            raise ValueError(str(next(iter(error.failures.values()))[0])) from error

"""The tensors of a checkpoint: weights, optimizer state, gradient scaler and EMA, in whole files.

The files are those of Accelerate for an unsharded model, also if FSDP2 shards the model. So every number of
processes, sharded or not, resumes a checkpoint.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import save
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME, SAFE_WEIGHTS_NAME, SCALER_NAME
from safetensors.torch import load_model, save_model
from torch import Tensor

from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.training.ema import EMA, EMA_FILE
from tinystories_slm.training.sharding import (
    copy_whole,
    is_sharded,
    shard_like,
    unsharded_copy,
    whole_tensor,
)


@dataclass(frozen=True)
class TrainedState:
    """The part of a run that a checkpoint holds beside the `TrainState`."""

    accelerator: Accelerator
    """Accelerator that has prepared model and optimizers."""
    model: TinyStoriesForCausalLM
    """The model itself, which FSDP2 may shard in place."""
    optimizers: list[torch.optim.Optimizer]
    ema: EMA | None


def write_whole(state: TrainedState, folder: Path) -> None:
    """Write the files into `folder`; every process must call this, and the main process writes."""
    # It warns about every tied weight that it does not write; loading ties them again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if is_sharded(state.model):
        _write_gathered(state, folder)
    else:
        state.accelerator.save_state(str(folder))
    average = state.ema.averaged_model() if state.ema else None
    if average is not None and state.accelerator.is_main_process:
        save_model(average, str(folder / EMA_FILE))


def read_whole(state: TrainedState, folder: Path) -> None:
    """Read the files of `folder` into the state, on every process."""
    has_files_of_fsdp = (folder / f"{FSDP_MODEL_NAME}.bin").is_file()  # written by an earlier version
    if is_sharded(state.model) and not has_files_of_fsdp:
        _read_into_shards(state, folder)
    else:
        state.accelerator.load_state(str(folder))
    if state.ema:
        state.ema.load(folder)


def _write_gathered(state: TrainedState, folder: Path) -> None:
    is_main = state.accelerator.is_main_process
    if is_main:
        folder.mkdir()
    weights = unsharded_copy(state.model).state_dict()
    save(weights, folder / SAFE_WEIGHTS_NAME, safe_serialization=True)  # on the main process alone
    for i, optimizer in enumerate(state.optimizers):
        save(_gathered_state(optimizer, is_kept=is_main), folder / _optimizer_file(i))
    if state.accelerator.scaler is not None:
        save(state.accelerator.scaler.state_dict(), folder / SCALER_NAME)


def _gathered_state(optimizer: torch.optim.Optimizer, *, is_kept: bool) -> dict[str, Any]:
    """Return the state of an optimizer with complete tensors, on the CPU; without any if not `is_kept`.

    One tensor after the other is gathered on every process.
    """
    saved = optimizer.state_dict()
    states = {}
    for index, values in saved["state"].items():
        whole = {name: _on_cpu(value, is_kept=is_kept) for name, value in values.items()}
        states[index] = whole if is_kept else {}
    return saved | {"state": states}


def _on_cpu(value: Any, *, is_kept: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = whole_tensor(value)
    return whole.cpu() if is_kept else None


def _read_into_shards(state: TrainedState, folder: Path) -> None:
    whole = TinyStoriesForCausalLM(state.model.config)
    load_model(whole, str(folder / SAFE_WEIGHTS_NAME))
    copy_whole(state.model.parameters(), whole.parameters())
    for i, optimizer in enumerate(state.optimizers):
        saved = torch.load(folder / _optimizer_file(i), map_location="cpu", weights_only=True)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, values in saved["state"].items():
            weight = weights[index]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    values[name] = shard_like(value, weight)
        optimizer.load_state_dict(saved)
    if state.accelerator.scaler is not None:
        state.accelerator.scaler.load_state_dict(torch.load(folder / SCALER_NAME, weights_only=True))


def _optimizer_file(index: int) -> str:
    return f"{OPTIMIZER_NAME}_{index}.bin" if index else f"{OPTIMIZER_NAME}.bin"

"""Shared by the tests of FSDP2: train in CPU processes, and compare runs of sharded and unsharded models."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from training.helpers import EXACT_METRICS, assert_equal_tensors, load_weights, read_series, run_launch

from tinystories_slm.config import RunConfig, save_config
from tinystories_slm.training.checkpoints import checkpoints
from tinystories_slm.training.ema import EMA_FILE
from tinystories_slm.training.sharded_checkpoints import SHARDS

FSDP2_ON_CPU = ROOT / "tests" / "training" / "fsdp2_on_cpu.py"


def fsdp2_environment() -> dict[str, str]:
    """Return what `accelerate launch` sets for configs/accelerate/gpu_8_fsdp2.yaml."""
    file = yaml.safe_load((ROOT / "configs" / "accelerate" / "gpu_8_fsdp2.yaml").read_text())
    names = {name: name.replace("_layer_cls_", "_cls_").upper() for name in file["fsdp_config"]}
    values = {names[name]: str(value) for name, value in file["fsdp_config"].items()}
    return values | {"ACCELERATE_USE_FSDP": "true"}


def train_sharded(
    config: RunConfig, num_processes: int, *, program: Path = FSDP2_ON_CPU, **env: str
) -> tuple[list[int], str]:
    """Train under FSDP2 in `num_processes` processes; return their exit codes and messages."""
    path = config.output_dir.with_name(f"{config.output_dir.name}.yaml")
    save_config(config, path)
    # On a CPU alone: the fused kernels replace the blocks that FSDP2 looks for.
    command = [program, "--config", path, "--train.cpu_kernels", "torch"]
    done = run_launch(command, num_processes, env=fsdp2_environment() | env)
    return [process.returncode for process in done], "\n".join(process.stderr for process in done)


def read_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights, averages and optimizer states of the newest checkpoint."""
    folder = checkpoints(run_dir)[-1]
    tensors = {}
    for name in ("model.safetensors", EMA_FILE):
        tensors |= {f"{name}.{key}": value for key, value in load_file(folder / name).items()}
    for path in sorted(folder.glob("optimizer*.bin")):
        for index, values in torch.load(path, weights_only=True)["state"].items():
            tensors |= {f"{path.name}.{index}.{key}": value for key, value in values.items()}
    return tensors


def assert_close_runs(actual: Path, expected: Path, *, rel: float) -> None:
    """Compare the metrics, weights and checkpoints of two runs within `rel`, relative to each tensor."""
    for name in EXACT_METRICS:
        assert read_series(actual, name) == pytest.approx(read_series(expected, name), rel=rel), name
    tensors, others = read_tensors(actual), read_tensors(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() <= rel * others[name].norm(), name
    for folder in ("best", "last"):
        assert load_weights(actual / folder).keys() == load_weights(expected / folder).keys()


def assert_same_shards(one: Path, other: Path) -> None:
    """Compare the newest sharded checkpoints of two runs bit by bit."""
    folders = [checkpoints(run)[-1] / SHARDS for run in (one, other)]
    for path in folders[0].iterdir():
        assert_equal_tensors(load_file(folders[1] / path.name), load_file(path))

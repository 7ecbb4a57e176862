"""Collective operations of a step by gloo processes: their number and bytes follow from the parameters."""

import json

import pytest
import torch
from conftest import ROOT
from training.helpers import run_processes
from training.sharded_runs import fsdp2_environment

from tinystories_slm.config import save_config
from tinystories_slm.doctor.paper_step import count_ddp, count_fsdp2
from tinystories_slm.model_costs import num_embedding_parameters, num_parameters
from tinystories_slm.training.communication import Collective, total_bytes

SCRIPT = ROOT / "tests" / "training" / "count_communication.py"
DDP, DDP_BF16 = "--train.reduce_dtype float32", "--train.reduce_dtype bfloat16"
TORCH_KERNELS = ("--train.cpu_kernels", "torch")  # FSDP2 finds the blocks by the name of their class
ACCUMULATED = "--train.per_device_batch_size 1"  # four micro-batches of one sequence


@pytest.fixture
def count(tiny_run, tmp_path):
    """Return a function from the flags of cases to what the main process counted in each."""

    def run(*cases: str, num_processes: int = 2, env: dict[str, str] | None = None, flags=()) -> list[dict]:
        config = tiny_run("--train.per_device_batch_size", "4", *flags)
        save_config(config, tmp_path / "config.yaml")
        output = tmp_path / "counts.json"
        arguments = (tmp_path / "config.yaml", output, *cases)
        run_processes(SCRIPT, *arguments, num_processes=num_processes, env=env)
        return list(json.loads(output.read_text()).values())

    return run


def collectives(record: dict) -> list[Collective]:
    return [Collective(*each) for each in record["collectives"]]


def test_ddp_sums_the_gradients_once_a_step(count):
    [plain, accumulated, half] = count(DDP, ACCUMULATED, DDP_BF16)
    num = plain["num_parameters"]

    assert plain["type"] == "MULTI_CPU"
    assert collectives(plain) == [Collective("all_reduce", 4 * num)]
    assert collectives(accumulated) == collectives(plain)
    assert collectives(half) == [Collective("all_reduce", 2 * num)]
    assert half["losses"][0] == plain["losses"][0]  # before the first sum
    assert half["losses"] != plain["losses"]
    assert half["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)


def test_fsdp2_gathers_weights_and_scatters_gradients(count, tiny_run):
    [plain, accumulated, half] = count(
        DDP, ACCUMULATED, DDP_BF16, env=fsdp2_environment(), flags=TORCH_KERNELS
    )
    assert (plain["type"], plain["kinds"]) == ("FSDP", ["DTensor"])
    config = tiny_run().model_config(vocab_size=300)
    num = num_parameters(config)
    num_in_blocks = num - num_embedding_parameters(config) - config.hidden_size  # and the last norm
    totals = total_bytes(collectives(plain))
    assert totals["all_gather"] == 4 * (num + num_in_blocks)  # blocks again for backward
    assert totals["reduce_scatter"] == 4 * num
    assert totals["all_reduce"] == 4 * plain["num_tensors"]  # the norm of each gradient

    again = total_bytes(collectives(accumulated))
    assert again == totals | {"all_gather": 4 * totals["all_gather"]}
    assert total_bytes(collectives(half)) == totals | {"reduce_scatter": 2 * num}
    assert half["losses"] != plain["losses"]
    assert half["losses"] == pytest.approx(plain["losses"], rel=1e-3)


def test_fsdp2_rounds_neither_the_loss_nor_the_sum_of_gradients(count):
    flags = (*TORCH_KERNELS, "--train.mixed_precision", "bf16")
    [plain] = count(DDP, env=fsdp2_environment(), flags=flags)
    totals = total_bytes(collectives(plain))
    assert totals["reduce_scatter"] == 4 * plain["num_parameters"]
    assert totals["all_gather"] < 4 * plain["num_parameters"]  # 16-bit weights, the blocks twice
    bf16 = torch.tensor(plain["losses"]).bfloat16().double().tolist()
    assert bf16 != plain["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_real_processes_exchange_what_is_counted_on_paper(count, tiny_run, num_processes):
    # 130 rows are padded for four processes; the gradients fill two buckets of DDP, of 1 MB and more.
    shape = (
        "--model.hidden_size",
        "130",
        "--model.num_hidden_layers",
        "4",
        "--train.per_device_batch_size",
        "2",
    )
    config = tiny_run(*TORCH_KERNELS, *shape)
    model_config = config.model_config(vocab_size=300)
    num_micro_batches = 4 // num_processes

    [ddp] = count(DDP, num_processes=num_processes, flags=(*TORCH_KERNELS, *shape))
    expected = count_ddp(config, model_config)
    assert collectives(ddp) == expected.collectives(num_micro_batches) and len(collectives(ddp)) == 2

    [fsdp2] = count(DDP, num_processes=num_processes, env=fsdp2_environment(), flags=(*TORCH_KERNELS, *shape))
    expected = count_fsdp2(config, model_config, precision="no", world_size=num_processes)
    assert sorted(collectives(fsdp2)) == sorted(expected.collectives(num_micro_batches))
    scattered = total_bytes(collectives(fsdp2))["reduce_scatter"]
    assert (scattered > 4 * num_parameters(model_config)) == (num_processes == 4)

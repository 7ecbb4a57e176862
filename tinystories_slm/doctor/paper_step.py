"""Communication of a training step on any number of processes, counted without starting them.

A model of fake tensors, which have a shape and no memory, runs one micro-batch as the first process of
torch's fake process group, whose operations do nothing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.numerics import DTYPES
from tinystories_slm.model import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.training.communication import Collective, CommunicationCounter
from tinystories_slm.training.distributed import sharding_precision

# Collective operations do not depend on the number of tokens.
_NUM_TOKENS = 8
_DDP_BUCKET_BYTES = 25 * 2**20  # PyTorch's, which `training.distributed` does not change


@dataclass(frozen=True)
class StepCommunication:
    """Collective operations of a process in one optimizer step, by the part of it that they overlap with."""

    forward: list[Collective]
    """Of the forward pass of each micro-batch."""
    backward: list[Collective]
    """Of the backward pass of each micro-batch, without the sum of gradients."""
    gradients: list[Collective]
    """Of the last backward pass alone: the sum of gradients."""
    update: list[Collective]
    """After it: the gradient norm, and the matrices of Muon under FSDP2."""

    def collectives(self, num_micro_batches: int) -> list[Collective]:
        """Return all operations of a step."""
        return (self.forward + self.backward) * num_micro_batches + self.gradients + self.update


def count_ddp(config: RunConfig, model_config: TinyStoriesConfig) -> StepCommunication:
    """Count the step of a model that each process holds completely; the same for any number of processes.

    DDP forms its buckets in the order in which the gradients are complete.
    """
    with FakeTensorMode():
        model, ready = _build_model(model_config), []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(ready.append)
        _forward(model).backward()
        buckets, _ = distributed._compute_bucket_assignment_by_size(
            ready, [distributed._DEFAULT_FIRST_BUCKET_BYTES, _DDP_BUCKET_BYTES], [False] * len(ready)
        )
        width = 2 if config.train.reduce_dtype == "bfloat16" else 4
        sums = [
            Collective("all_reduce", width * sum(ready[index].numel() for index in bucket))
            for bucket in buckets
        ]
    return StepCommunication(forward=[], backward=[], gradients=sums, update=[])


def count_fsdp2(
    config: RunConfig, model_config: TinyStoriesConfig, *, precision: str, world_size: int
) -> StepCommunication:
    """Count the step of a model that `world_size` processes shard, as with gpu_8_fsdp2.yaml.

    FSDP2 divides the first dimension of each parameter and pads it, so that the bytes grow where there are
    more processes than rows.
    """
    with _fake_process_group(world_size) as mesh, FakeTensorMode():
        model = _build_model(model_config)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=model._no_split_modules,
            reshard_after_forward=True,
            mixed_precision_policy=sharding_precision(config.train, precision),
            cpu_ram_efficient_loading=False,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=precision,
            device=torch.device("cpu"),
            is_main_process=False,
            parallelism_config=SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names),
            torch_device_mesh=mesh,
        )
        model = fsdp2_prepare_model(accelerator, model)
        with CommunicationCounter() as forward, _autocast(precision):
            loss = _forward(model)
        with CommunicationCounter() as backward:
            loss.backward()
        with CommunicationCounter() as update:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        if config.train.optimizer == "muon":
            update.collectives += 2 * [_exchange_of_muon(model, precision, world_size)]
    return StepCommunication(
        forward=forward.collectives,
        backward=[each for each in backward.collectives if each.kind == "all_gather"],
        gradients=[each for each in backward.collectives if each.kind != "all_gather"],
        update=update.collectives,
    )


def _exchange_of_muon(model: TinyStoriesForCausalLM, precision: str, world_size: int) -> Collective:
    """Return one of the two exchanges of `matrix_exchange`, with the mean bytes of a process."""
    num_weights = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    width = 4 if precision == "no" else 2  # that of the orthogonalization
    return Collective("all_to_all", width * num_weights // world_size)


def _build_model(model_config: TinyStoriesConfig) -> TinyStoriesForCausalLM:
    model = TinyStoriesForCausalLM(model_config)
    model.set_attn_implementation("sdpa")
    model.model._check_context = lambda *_: None  # reads positions, which fake tensors do not have
    return model.train()


def _forward(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.zeros((1, _NUM_TOKENS), dtype=torch.int64)
    return model(input_ids=ids, labels=ids, use_cache=False, loss_only=True).loss


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "no")


@contextlib.contextmanager
def _fake_process_group(world_size: int) -> Iterator[DeviceMesh]:
    """Make this process the first of `world_size`; their collective operations do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",))
    finally:
        distributed.destroy_process_group()

"""Tensors and models that FSDP2 shards: the part of this process, and the whole.

A sharded parameter is a `DTensor`, whose rows are divided among the processes. Where a model is not sharded,
each function returns or copies the tensor itself.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tinystories_slm.model import TinyStoriesForCausalLM


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` on this process; it shares the memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the complete tensor on every process; every process must call this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the complete `tensor`, equal on every process, on the device of `other` and sharded as it is.

    No process communicates.
    """
    if not isinstance(other, DTensor):
        return tensor.detach().to(other.device)
    return distribute_tensor(tensor.detach(), other.device_mesh, other.placements, src_data_rank=None)


def copy_whole(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each complete tensor of `sources` to the tensor of `targets`, which may be sharded."""
    for target, source in zip(targets, sources, strict=True):
        local_part(target).copy_(local_part(shard_like(source, target)))


def unsharded_copy(
    model: TinyStoriesForCausalLM, weights: Iterable[Tensor] | None = None
) -> TinyStoriesForCausalLM:
    """Return `model` itself, or a complete copy of it on every process if it is sharded.

    A forward pass of a sharded model is a collective operation of all processes, and its parameters are
    shards. The copy can be used by one process alone. If the model is sharded, every process must call
    this function. The copy takes 4 bytes per parameter on each process. With `weights`, in the order of
    `model.parameters()` and sharded like them, it has these.
    """
    if not is_sharded(model):
        return model
    copy = TinyStoriesForCausalLM(model.config).to(next(model.parameters()).device)
    weights = model.parameters() if weights is None else weights
    for target, weight in zip(copy.parameters(), weights, strict=True):
        target.detach().copy_(whole_tensor(weight))
    return copy.train(model.training)

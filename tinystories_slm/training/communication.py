"""Collective operations of a training step: their number, their bytes, and the bound of a ring."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of torch's operators, of the namespaces c10d (DDP, FSDP2) and _c10d_functional (DTensor).
_KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
}


class Collective(NamedTuple):
    """A collective operation, as every process of the group takes part in it."""

    kind: str
    """`all_reduce`, `all_gather`, `reduce_scatter`, `broadcast` or `all_to_all`."""
    num_bytes: int
    """Bytes of the complete tensor: of the result of an all-gather, of the input of a reduce-scatter. Of an
    all-to-all, those of this process."""

    def ring_bytes(self, world_size: int) -> float:
        """Bytes that each process sends in a ring of `world_size`.

        It is the least possible where switches do not add: 2 (N - 1) / N of its bytes for an all-reduce,
        which is a reduce-scatter and an all-gather, and half of it for each of the two (Patarasuk and Yuan,
        J. Parallel Distrib. Comput. 69, 2009).
        """
        num_rounds = 2 if self.kind == "all_reduce" else 1
        return num_rounds * (world_size - 1) / world_size * self.num_bytes

    def num_hops(self, world_size: int) -> int:
        """Number of messages that follow one another in a ring of `world_size`."""
        return (2 if self.kind == "all_reduce" else 1) * (world_size - 1)


class CommunicationCounter(TorchDispatchMode):
    """Context manager that records the collective operations of this process, in their order.

    torch's CommDebugMode counts the same operations, without their bytes. Backward runs in the context, too:
    torch passes dispatch modes on to the threads of autograd.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor first replaces the operation by those on its shards
        result = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func.overloadpacket.__name__)
        if func.namespace in ("c10d", "_c10d_functional") and kind:
            num_bytes = max(_num_bytes(part) for part in (*args, result))
            self.collectives.append(Collective(kind, num_bytes))
        return result


def total_bytes(collectives: Iterable[Collective]) -> dict[str, int]:
    """Return the bytes of `collectives` by kind."""
    totals: Counter[str] = Counter()
    for each in collectives:
        totals[each.kind] += each.num_bytes
    return dict(totals)


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in `value`, which may be nested."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))

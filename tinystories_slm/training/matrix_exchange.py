"""Compute on whole matrices whose rows FSDP2 divides among the processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single
from torch.distributed.tensor import DTensor

Shape = tuple[int, int]


def map_whole_matrices(
    function: Callable[[list[Tensor]], list[Tensor]], parts: list[Tensor], like: list[DTensor]
) -> list[Tensor]:
    """Apply `function` to whole matrices, and return this process's rows of the results.

    `parts` are this process's rows of matrices that are sharded as those of `like`. Each process gets some
    of the matrices whole, about an equal share of the work, and `function` maps their list to a list of equal
    shapes. Two exchanges, of all matrices together, move 2 (N - 1) / N of the numbers in `parts` from each of
    N processes, on average. To gather every matrix on every process would move N / 2 times as many, and each
    process would compute all of them.
    """
    mesh = like[0].device_mesh
    group, num, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    shapes = [tuple(matrix.shape) for matrix in like]
    rows = [_rows_by_process(shape[0], num) for shape in shapes]
    owners = assign_owners(shapes, num)
    owned = [[i for i, owner in enumerate(owners) if owner == process] for process in range(num)]
    mine, empty = owned[rank], parts[0].new_empty(0)

    received = _exchange(
        [[parts[i] for i in owned[process]] for process in range(num)],
        [[(rows[i][process], shapes[i][1]) for i in mine] for process in range(num)],
        group,
        empty=empty,
    )
    results = function([torch.cat(pieces) for pieces in zip(*received, strict=True)])
    pieces = [result.split(rows[i]) for i, result in zip(mine, results, strict=True)]
    returned = _exchange(
        [[piece[process] for piece in pieces] for process in range(num)],
        [[(rows[i][rank], shapes[i][1]) for i in owned[process]] for process in range(num)],
        group,
        empty=empty,
    )
    by_index = {
        i: part for process in range(num) for i, part in zip(owned[process], returned[process], strict=True)
    }
    return [by_index[i] for i in range(len(parts))]


def assign_owners(shapes: Sequence[Shape], num_processes: int) -> list[int]:
    """Return the process that computes each matrix: the largest first, each by the least busy process.

    The work of orthogonalization is proportional to the numbers of a matrix times its shorter side.
    """
    work = [min(shape) * shape[0] * shape[1] for shape in shapes]
    owners, load = [0] * len(shapes), [0] * num_processes
    for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
        owners[i] = min(range(num_processes), key=load.__getitem__)
        load[owners[i]] += work[i]
    return owners


def _rows_by_process(num_rows: int, num_processes: int) -> list[int]:
    """Return how many rows each process has, as `torch.chunk` divides them: the last ones may have none."""
    most = -(-num_rows // num_processes)
    return [min(most, max(0, num_rows - most * process)) for process in range(num_processes)]


def _exchange(
    outgoing: list[list[Tensor]], incoming: list[list[Shape]], group: ProcessGroup, *, empty: Tensor
) -> list[list[Tensor]]:
    """Send each process its list of `outgoing`, and return what each has sent, of the shapes `incoming`.

    `empty` has no numbers, and the type and device of all: a process may send nothing.
    """
    sent = torch.cat([empty, *(tensor.reshape(-1) for each in outgoing for tensor in each)])
    sizes = [[rows * columns for rows, columns in shapes] for shapes in incoming]
    received = sent.new_empty(sum(map(sum, sizes)))
    all_to_all_single(
        received,
        sent,
        output_split_sizes=[sum(each) for each in sizes],
        input_split_sizes=[sum(tensor.numel() for tensor in each) for each in outgoing],
        group=group,
    )
    parts = iter(received.split([size for each in sizes for size in each]))
    return [[next(parts).view(shape) for shape in shapes] for shapes in incoming]

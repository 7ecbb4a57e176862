"""Whole matrices of sharded ones: equal results on any number of processes, and the numbers that are sent."""

import json

import pytest
from training.helpers import run_launch

from tinystories_slm.training.matrix_exchange import assign_owners

# Every process prints the largest difference to the result of one process, and the numbers that it sends to
# others in each exchange.
PROGRAM = """
import json, sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from tinystories_slm.training import matrix_exchange

shapes, dtype = json.loads(sys.argv[1]), getattr(torch, sys.argv[2])
distributed.init_process_group("gloo")
rank, num_sent = distributed.get_rank(), []
exchange = matrix_exchange.all_to_all_single

def counted_exchange(received, sent, *, input_split_sizes, **options):
    num_sent.append(sum(input_split_sizes) - input_split_sizes[rank])
    exchange(received, sent, input_split_sizes=input_split_sizes, **options)

def transform(matrices):
    return [matrix - matrix.mean(dim=0) + matrix.max() for matrix in matrices]

matrix_exchange.all_to_all_single = counted_exchange
mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
generator = torch.Generator().manual_seed(0)
whole = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
sharded = [distribute_tensor(matrix, mesh, [Shard(0)], src_data_rank=None) for matrix in whole]
parts = matrix_exchange.map_whole_matrices(transform, [each.to_local() for each in sharded], sharded)
expected = [distribute_tensor(each, mesh, [Shard(0)], src_data_rank=None) for each in transform(whole)]
print(json.dumps([all(torch.equal(one, other.to_local()) for one, other in zip(parts, expected)), num_sent]))
distributed.destroy_process_group()
"""


def exchange(tmp_path, num_processes: int, shapes: list[tuple[int, int]], dtype: str) -> list:
    script = tmp_path / "exchange.py"
    script.write_text(PROGRAM)
    done = run_launch([script, json.dumps(shapes), dtype], num_processes, env={})
    assert [process.returncode for process in done] == [0] * num_processes, done[0].stderr
    return [json.loads(process.stdout.splitlines()[-1]) for process in done]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_each_process_sends_its_share_twice(num_processes, tmp_path):
    shapes = [(16, 16), (16, 40), (40, 16), (8, 64)] * num_processes
    share = sum(rows * columns for rows, columns in shapes) // num_processes
    reports = exchange(tmp_path, num_processes, shapes, "float32")
    assert [is_equal for is_equal, _ in reports] == [True] * num_processes
    # Gathered everywhere, each process would receive N - 1 shares: N / 2 times as many.
    sent = [sum(num_sent) for _, num_sent in reports]
    expected = 2 * share * (num_processes - 1) / num_processes
    assert sum(sent) == expected * num_processes and max(sent) <= 1.1 * expected
    assert {len(num_sent) for _, num_sent in reports} == {2}  # exchanges, however many matrices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_matrices_need_not_be_divisible(dtype, tmp_path):
    reports = exchange(tmp_path, 3, [(7, 5), (2, 9)], dtype)  # the last process owns nothing
    assert [is_equal for is_equal, _ in reports] == [True] * 3


def test_owners_share_the_work():
    block = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
    owners = assign_owners(block * 8, 8)
    work = [0] * 8
    for (rows, columns), owner in zip(block * 8, owners, strict=True):
        work[owner] += min(rows, columns) * rows * columns
    assert max(work) <= 1.05 * sum(work) / 8

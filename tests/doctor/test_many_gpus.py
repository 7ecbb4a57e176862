"""The estimate of a step on many processes: its arithmetic, and what the doctor prints."""

import re

import pytest
from conftest import ROOT, run_script

from tinystories_slm.config.command_args.doctor import ScaleDoctorArgs, doctor_args
from tinystories_slm.config.parse import parse
from tinystories_slm.doctor.many_gpus import Cluster, cluster_of, estimate_scaling, estimate_step
from tinystories_slm.doctor.paper_step import StepCommunication, count_ddp, count_fsdp2
from tinystories_slm.errors import UserError
from tinystories_slm.model_costs import num_parameters
from tinystories_slm.training.communication import Collective, total_bytes

SMALL = ("--config", str(ROOT / "configs" / "9m.yaml"), "--data.data_dir", "data/none")


def scale_args(*flags: str) -> ScaleDoctorArgs:
    return parse(ScaleDoctorArgs, [*SMALL, *flags])


def test_ring_and_tree_of_eight_processes():
    cluster = Cluster(world_size=8, link_bytes_per_s=1e9, hop_s=1e-3, flops_per_second=1e12)
    gather = Collective("all_gather", 8_000_000)
    assert gather.ring_bytes(8) == 7_000_000 and gather.num_hops(8) == 7
    assert cluster.collective_s(gather) == pytest.approx(0.007 + 0.007)
    small, large = Collective("all_reduce", 8_000), Collective("all_reduce", 80_000_000)
    assert cluster.collective_s(small) == pytest.approx(16e-6 + 0.006)  # a tree: 2 log2 8 messages
    assert cluster.collective_s(large) == pytest.approx(0.14 + 0.014)  # a ring: 2 (8 - 1) messages


def test_exchange_runs_beside_the_computation():
    cluster = Cluster(world_size=2, link_bytes_per_s=1e9, hop_s=0.0, flops_per_second=1e12)
    sums = [Collective("all_reduce", 10_000_000), Collective("all_reduce", 20_000_000)]  # 10 and 20 ms
    communication = StepCommunication(forward=[], backward=[], gradients=sums, update=[])

    def exposed_s(compute_s: float, num_micro_batches: int = 1) -> float:
        step = estimate_step(
            communication, cluster, step_flops=2 * compute_s * 1e12, num_micro_batches=num_micro_batches
        )
        assert step.compute_s == pytest.approx(compute_s)
        assert step.exchange_s == pytest.approx(0.03)
        return step.exposed_s

    assert exposed_s(0.09) == pytest.approx(0.02)  # the last sum, after 60 ms of backward
    assert exposed_s(0.003) == pytest.approx(0.028)  # two ms of backward hide two ms
    assert exposed_s(0.09, num_micro_batches=6) == pytest.approx(0.02)
    assert exposed_s(0.009, num_micro_batches=6) == pytest.approx(0.029)  # one backward pass of 1 ms


def test_bytes_follow_from_the_number_of_parameters():
    args = scale_args("--train.reduce_dtype", "bfloat16")
    model_config = args.model_config(vocab_size=10_000)
    num = num_parameters(model_config)
    ddp = count_ddp(args, model_config)
    assert total_bytes(ddp.collectives(4)) == {"all_reduce": 2 * num}
    sharded = count_fsdp2(args, model_config, precision="bf16", world_size=8)
    totals = total_bytes(sharded.collectives(1))
    assert totals["reduce_scatter"] == 2 * num  # every dimension is divisible by 8
    assert sum(each.num_bytes for each in sharded.forward) == 2 * num


def test_sharded_muon_exchanges_the_matrices_of_the_blocks_twice():
    args = scale_args("--train.optimizer=muon")
    model_config = args.model_config(vocab_size=10_000)
    blocks = 8 * (4 * 256 * 256 + 2 * 256 * 1024)  # attention and feed-forward layer
    for precision, width in (("no", 4), ("bf16", 2)):
        update = count_fsdp2(args, model_config, precision=precision, world_size=8).update
        [first, second] = [each for each in update if each.kind == "all_to_all"]
        assert first == second and first.num_bytes == width * blocks // 8
        assert first.ring_bytes(8) == 7 / 8 * first.num_bytes


def test_average_is_sharded_as_well():
    plain, averaged = (
        [each.memory_bytes for each in estimate_scaling(scale_args("--world_size=8", *flags))]
        for flags in ((), ("--train.ema_decay=0.99",))
    )
    num = num_parameters(scale_args().model_config(vocab_size=10_000))
    assert averaged[0] - plain[0] == 4 * num
    assert averaged[1] - plain[1] == pytest.approx(4 * num / 8, rel=0.01)


@pytest.mark.weekly
def test_sharding_pads_where_processes_outnumber_rows():
    args = scale_args()
    model_config = args.model_config(vocab_size=10_000)
    few, many = (
        sum(
            each.num_bytes
            for each in count_fsdp2(args, model_config, precision="no", world_size=size).forward
        )
        for size in (8, 1024)
    )
    assert few == 4 * num_parameters(model_config)
    assert many > 2 * few  # matrices of 256 rows are padded to 1,024


def test_doctor_prints_the_estimate_and_starts_nothing(tmp_path):
    output = tmp_path / "estimate.json"
    flags = ("--world_size=1024", "--num_machines=128", "--train.batch_size=1024", f"--output={output}")
    done = run_script("doctor.py", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"note +processes +1,024 on 128 machines; a step of each is 1 micro-batch of 1 x 256", done.stdout
    )
    number = re.search(r"note +DDP exchange +\d+ all_reduce of ([\d,]+) bytes a step; each", done.stdout)[1]
    args = scale_args()
    assert int(number.replace(",", "")) == 4 * num_parameters(args.model_config(vocab_size=10_000))
    assert re.search(r"slow +FSDP2 step +about \d+(\.\d+)? ms: \S+ ms of computation, and ", done.stdout)
    assert done.stdout.splitlines()[-1] == "0 problems" and output.exists()


def test_options_of_the_estimate_are_checked():
    assert doctor_args(["--config", "a.yaml", "--world_size=4"]) is ScaleDoctorArgs
    with pytest.raises(
        UserError, match=r"train.batch_size \(64\) must be a multiple of the number of processes"
    ):
        estimate_scaling(scale_args("--world_size=1024"))
    for flags, message in (
        (["--world_size=0"], r"world_size \(0\) must be at least 1"),
        (["--num_machines=3"], r"world_size \(8\) must be a multiple of num_machines \(3\)"),
        (["--link_gbps=0"], r"link_gbps \(0\.0\) must be above 0"),
        (["--hop_us=-1"], r"hop_us \(-1\.0\) must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            scale_args(*flags)


def test_one_machine_uses_the_links_between_its_gpus():
    assert cluster_of(scale_args("--world_size=8")).link_bytes_per_s == 450e9
    assert cluster_of(scale_args("--world_size=16")).link_bytes_per_s == 400e9

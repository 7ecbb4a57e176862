"""Estimate of a training step on many processes: memory, communication and time, without starting them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tinystories_slm.config import run_config_of
from tinystories_slm.config.command_args.doctor import ScaleDoctorArgs
from tinystories_slm.doctor.diagnostic import Diagnostic
from tinystories_slm.doctor.numerics import DTYPES
from tinystories_slm.doctor.paper_step import StepCommunication, count_ddp, count_fsdp2
from tinystories_slm.doctor.resources import vocab_size
from tinystories_slm.io.units import format_bytes, format_flops
from tinystories_slm.model_costs import Memory, flops_per_token, num_parameters
from tinystories_slm.training.communication import Collective, total_bytes
from tinystories_slm.training.runtime import estimate_memory, resolve_per_device_batch_size

_GPU = torch.device("cuda")
# A step that takes more than twice its computation needs other processes, or fewer.
_MIN_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Cluster:
    """Processes with a GPU each, and the links between them."""

    world_size: int
    link_bytes_per_s: float
    """Of the slowest link of a ring through all processes, in one direction."""
    hop_s: float
    """Latency of a message."""
    flops_per_second: float
    """Of one process."""

    def collective_s(self, collective: Collective) -> float:
        """Return the seconds of `collective` in a ring, or in a tree if that is faster.

        A ring of N processes has 2 (N - 1) messages that follow one another, and a pair of trees 2 log2 N, at
        twice the bytes (Sanders et al., Parallel Computing 35, 2009). NCCL has trees for all-reduce only.
        """
        bytes_s = collective.ring_bytes(self.world_size) / self.link_bytes_per_s
        ring_s = bytes_s + collective.num_hops(self.world_size) * self.hop_s
        if collective.kind != "all_reduce":
            return ring_s
        tree_hops = 2 * math.ceil(math.log2(self.world_size))
        return min(ring_s, 2 * collective.num_bytes / self.link_bytes_per_s + tree_hops * self.hop_s)

    def total_s(self, collectives: Sequence[Collective]) -> float:
        """Return the seconds of `collectives`, one after the other."""
        return sum(map(self.collective_s, collectives))


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of an optimizer step."""

    compute_s: float
    exchange_s: float
    """Of all collective operations."""
    exposed_s: float
    """Of the operations that do not run beside computation."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPU computes."""
        return self.compute_s / self.total_s


def estimate_step(
    communication: StepCommunication, cluster: Cluster, *, step_flops: float, num_micro_batches: int
) -> StepTime:
    """Estimate a step whose `step_flops` operations are shared by all processes.

    A third of the computation is the forward pass. Communication runs beside it: gathered weights beside
    the forward and the backward pass that they belong to, sums of gradients beside the last backward pass.
    Neither the first gather of a pass nor the last sum has any computation beside it.
    """
    compute_s = step_flops / cluster.world_size / cluster.flops_per_second
    forward_s, backward_s = compute_s / num_micro_batches / 3, compute_s / num_micro_batches * 2 / 3
    gather_s, again_s = cluster.total_s(communication.forward), cluster.total_s(communication.backward)
    sums = communication.gradients
    first_s = cluster.total_s(communication.forward[:1])
    exposed_s = num_micro_batches * max(first_s, gather_s - forward_s)
    exposed_s += (num_micro_batches - 1) * max(0.0, again_s - backward_s)
    exposed_s += max(cluster.total_s(sums[-1:]), again_s + cluster.total_s(sums) - backward_s)
    exposed_s += cluster.total_s(communication.update)
    exchange_s = cluster.total_s(communication.collectives(num_micro_batches))
    return StepTime(compute_s, exchange_s, exposed_s)


def sharded_memory_bytes(
    complete: Memory, communication: StepCommunication, *, num_weights: int, world_size: int, width: int
) -> int:
    """Estimate the bytes of a process that shards the model, from those of one with the complete model.

    They are the shards of weights, gradients, optimizer state and average, padded as FSDP2 does; gathered
    weights of `width` bytes, those that stay from forward to backward and two blocks; the largest complete
    gradient before it is reduced; the head's gradient, which the loss holds; activations and logits. The
    estimate was not compared with a GPU.
    """
    gathered, again = (
        [each.num_bytes for each in collectives]
        for collectives in (communication.forward, communication.backward)
    )
    shard_share = sum(gathered) / width / world_size / num_weights
    states = shard_share * (2 * 4 * num_weights + complete.optimizer + complete.ema)
    unsharded = sum(gathered) - sum(again) + sum(sorted(again)[-2:])
    gradients = max(each.num_bytes for each in communication.gradients)
    head_gradient = complete.gradients - 4 * num_weights
    return round(states + unsharded + gradients + head_gradient + complete.activations + complete.logits)


@dataclass(frozen=True)
class ScalingEstimate:
    """Estimated optimizer step of a process of a launch."""

    distribution: str
    """`DDP`: each process holds the complete model; `FSDP2`: all processes shard it."""
    rows: int
    """Sequences of a micro-batch."""
    num_micro_batches: int
    collectives: list[Collective]
    sent_bytes: float
    """Bytes that the process sends in a ring."""
    memory_bytes: int
    step: StepTime


def estimate_scaling(args: ScaleDoctorArgs) -> list[ScalingEstimate]:
    """Estimate a step of `args`, with the complete model on each GPU, and with a sharded one.

    Raises:
        UserError: the batch size is not divisible among the processes.
    """
    config, world_size, seq_len = run_config_of(args), args.world_size, args.data.seq_len
    precision = "bf16" if args.train.mixed_precision == "auto" else args.train.mixed_precision
    model_config = config.model_config(vocab_size=vocab_size(config))
    rows = resolve_per_device_batch_size(config, _GPU, precision=precision, num_processes=world_size)
    num_micro_batches = args.train.batch_size // (rows * world_size)
    step_flops = args.train.batch_size * seq_len * flops_per_token(model_config, seq_len)
    memory = estimate_memory(config, _GPU, precision=precision, rows=rows, vocab_size=model_config.vocab_size)
    alone = StepCommunication(forward=[], backward=[], gradients=[], update=[])
    ddp = count_ddp(config, model_config) if world_size > 1 else alone
    counted = {"DDP": (ddp, memory.total)}
    if world_size > 1:
        sharded = count_fsdp2(config, model_config, precision=precision, world_size=world_size)
        sharded_bytes = sharded_memory_bytes(
            memory,
            sharded,
            num_weights=num_parameters(model_config),
            world_size=world_size,
            width=DTYPES[precision].itemsize,
        )
        counted["FSDP2"] = (sharded, sharded_bytes)
    cluster = cluster_of(args)
    estimates = []
    for distribution, (communication, memory_bytes) in counted.items():
        collectives = communication.collectives(num_micro_batches)
        step = estimate_step(
            communication, cluster, step_flops=step_flops, num_micro_batches=num_micro_batches
        )
        sent_bytes = sum(each.ring_bytes(world_size) for each in collectives)
        estimates.append(
            ScalingEstimate(
                distribution, rows, num_micro_batches, collectives, sent_bytes, memory_bytes, step
            )
        )
    return estimates


def cluster_of(args: ScaleDoctorArgs) -> Cluster:
    """Return the cluster that `args` states."""
    gbps = args.gpu_link_gbps if args.num_hosts == 1 else min(args.gpu_link_gbps, args.link_gbps)
    return Cluster(
        world_size=args.world_size,
        link_bytes_per_s=gbps * 1e9 / 8,
        hop_s=args.hop_us * 1e-6,
        flops_per_second=args.mfu * args.gpu_tflops * 1e12,
    )


def check_scaling(args: ScaleDoctorArgs) -> Iterator[Diagnostic]:
    """Describe the estimated step of `args`.

    Raises:
        UserError: the batch size is not divisible among the processes.
    """
    estimates, cluster = estimate_scaling(args), cluster_of(args)
    rows, num_micro_batches = estimates[0].rows, estimates[0].num_micro_batches
    yield Diagnostic(
        "processes",
        "note",
        f"{args.world_size:,} on {args.num_hosts:,} machine{'' if args.num_hosts == 1 else 's'}; a step of "
        f"each is {num_micro_batches} micro-batch{'' if num_micro_batches == 1 else 'es'} of {rows} x "
        f"{args.data.seq_len} tokens",
    )
    yield Diagnostic(
        "assumptions",
        "note",
        f"{format_flops(cluster.flops_per_second)} a process, "
        f"{cluster.link_bytes_per_s / 1e9:,.3g} GB/s a link, {args.hop_us:g} us a message; "
        "nothing was measured (docs/communication.md)",
    )
    for estimate in estimates:
        name = estimate.distribution
        needed = f"a process needs about {format_bytes(estimate.memory_bytes)}"
        yield Diagnostic(f"{name} memory", "note", needed)
        yield Diagnostic(f"{name} exchange", "note", _describe_exchange(estimate))
        yield _describe_time(f"{name} step", estimate.step)


def _describe_exchange(estimate: ScalingEstimate) -> str:
    counts = Counter(each.kind for each in estimate.collectives)
    totals = total_bytes(estimate.collectives)
    kinds = ", ".join(f"{counts[kind]} {kind} of {totals[kind]:,} bytes" for kind in counts)
    return f"{kinds or 'none'} a step; each process sends {format_bytes(estimate.sent_bytes)} in a ring"


def _describe_time(subject: str, step: StepTime) -> Diagnostic:
    text = (
        f"about {1e3 * step.total_s:,.3g} ms: {1e3 * step.compute_s:,.3g} ms of computation, and "
        f"{1e3 * step.exposed_s:,.3g} of {1e3 * step.exchange_s:,.3g} ms of exchange that is not beside it; "
        f"efficiency {step.efficiency:.0%}"
    )
    if step.efficiency >= _MIN_EFFICIENCY:
        return Diagnostic(subject, "ok", text)
    remedy = "fewer processes, a larger train.batch_size, or --train.reduce_dtype bfloat16"
    return Diagnostic(subject, "slow", text, remedy)

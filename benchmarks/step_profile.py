"""Profile a training step: tokens per second, device utilization, and the synchronizations of the host.

Runs the steps of the training loop (`start_run`, `train_step`, `sync_stop_condition`) in this process, on
random token ids.
"""

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from random_tokens import write_random_tokens
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.config.flags import to_flags
from tinystories_slm.training.loop import sync_stop_condition, train_step
from tinystories_slm.training.run import TrainingRun, start_run

# Calls that make the host wait for the device, by the profiler's names.
_SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_READ = "aten::_local_scalar_dense"  # a number read from a tensor: a synchronization on a GPU
OUT_OF_TIME = "out of time"
_WARM_UP_STEPS, _PROFILED_STEPS, _TIMED_S = 5, 5, 3.0


class Shape(Protocol):
    """Attributes of `train.Shape` that a profile needs."""

    vocab_size: int
    seq_len: int
    micro_batches: tuple[int, ...]

    def flags(self, family: str) -> list[str]: ...


@dataclass(frozen=True)
class StepProfile:
    """Measurements of one configuration; all zero if `problem` is set."""

    shape: str
    compiled: bool
    micro_batch: int
    """Sequences per forward pass and per step."""
    problem: str | None = None
    """Reason for which nothing was measured."""
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    """Share of the device's published or measured peak, 0 to 1."""
    step_seconds: float = 0.0
    device_seconds: float = 0.0
    """Seconds of a step in which at least one kernel runs; 0 on a CPU."""
    input_seconds: float = 0.0
    """Seconds of a step that the host spends on the batch; the device waits only if its queue is empty."""
    synchronizations: int = 0
    """Waits of the host for the device, per step."""
    reads: int = 0
    """Numbers read from tensors, per step."""
    kernels: int = 0
    """Kernels launched per step; 0 on a CPU."""
    peak_bytes: int = 0
    """Peak device memory of tensors; 0 on a CPU."""

    def cells(self) -> list[str]:
        """Cells of the measurements in a table row."""
        if self.problem:
            return [self.problem, "", "", "", "", ""]
        return [
            f"{self.tokens_per_second:,.0f}",
            f"{self.mfu:.1%}",
            f"{self.device_seconds / self.step_seconds:.1%}" if self.kernels else "",
            f"{self.input_seconds / self.step_seconds:.1%}",
            f"{self.synchronizations} ({self.reads} numbers read)",
            f"{self.peak_bytes / 1e6:,.0f}",
        ]


def profile_shapes(
    shapes: Mapping[str, Shape],
    scratch: Path,
    *,
    device: str,
    seconds: float,
    compiled: Sequence[bool] = (True, False),
    flags: Sequence[str] = (),
) -> list[StepProfile]:
    """Profile every shape, compiled and eager, at each of its micro-batches; start none after `seconds`.

    The largest micro-batches are measured first, as the time may not suffice for all.

    Raises:
        SystemExit: training would not run on `device`.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != found:  # the loop uses the best device available, as for a user
        raise SystemExit(f"--device {device}: training would run on {found} here")
    deadline_s = time.perf_counter() + seconds
    data = {
        name: write_random_tokens(scratch / name, vocab_size=shape.vocab_size, num_tokens=2**22)
        for name, shape in shapes.items()
    }
    rows = {}
    for size in range(max(len(shape.micro_batches) for shape in shapes.values())):
        for name, is_compiled in product(shapes, compiled):
            micro_batches = sorted(shapes[name].micro_batches, reverse=True)
            if size >= len(micro_batches):
                continue
            micro_batch = micro_batches[size]
            if time.perf_counter() > deadline_s:
                row = StepProfile(name, is_compiled, micro_batch, problem=OUT_OF_TIME)
            else:
                options = {
                    "output_dir": scratch / f"run_{len(rows)}",
                    "train.batch_size": micro_batch,
                    "train.per_device_batch_size": micro_batch,
                    "train.compile": is_compiled,
                    "train.eval_stories": 1,
                }
                config = parse_config([*data[name], *shapes[name].flags("gpt2"), *to_flags(options), *flags])
                row = _profile(config, name, is_compiled, micro_batch)
            rows[list(shapes).index(name), not is_compiled, micro_batch] = row
            print(row, file=sys.stderr, flush=True)
    return [rows[key] for key in sorted(rows)]


def _profile(config: RunConfig, name: str, compiled: bool, micro_batch: int) -> StepProfile:
    torch._dynamo.reset()  # discard the code compiled for another shape
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        run = start_run(config)
        with closing(run):
            measured = _measure(run)
    except torch.OutOfMemoryError:
        return StepProfile(name, compiled, micro_batch, problem="out of memory")
    finally:
        run = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    return StepProfile(name, compiled, micro_batch, peak_bytes=peak_bytes, **measured)


def _measure(run: TrainingRun) -> dict[str, float | int]:
    for _ in range(_WARM_UP_STEPS):
        _step(run)
    one_s = _time_steps(run, 1)
    input_s = _record_input_seconds(run)
    num_steps = max(3, min(200, round(_TIMED_S / one_s)))
    step_s = _time_steps(run, num_steps) / num_steps
    input_seconds = sum(input_s) / num_steps

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as profiled:
        _time_steps(run, _PROFILED_STEPS)
    counts = {event.key: event.count for event in profiled.key_averages()}
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    # `_time_steps` itself waits twice; the integer division drops these waits.
    waits = sum(counts.get(key, 0) for key in _SYNCHRONIZATIONS)
    tokens_per_second = run.tokens_per_step / step_s
    return {
        "tokens_per_second": tokens_per_second,
        "mfu": run.mfu(tokens_per_second),
        "step_seconds": step_s,
        # The profiler slows the host, not the kernels, so kernel time is compared with an unprofiled step.
        "device_seconds": sum(end - begin for begin, end in merge_intervals(kernels)) / 1e6 / _PROFILED_STEPS,
        "input_seconds": input_seconds,
        "synchronizations": waits // _PROFILED_STEPS,
        "reads": counts.get(_READ, 0) // _PROFILED_STEPS,
        "kernels": len(kernels) // _PROFILED_STEPS,
    }


def _step(run: TrainingRun) -> None:
    train_step(run)
    sync_stop_condition(run)


def _time_steps(run: TrainingRun, num_steps: int) -> float:
    """Return the seconds of `num_steps` steps, up to the end of the last kernel."""
    _synchronize()
    started_s = time.perf_counter()
    for _ in range(num_steps):
        _step(run)
    _synchronize()
    return time.perf_counter() - started_s


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _record_input_seconds(run: TrainingRun) -> list[float]:
    """Return a list to which every later read of a batch appends its seconds."""
    seconds, batch = [], run.dataset.batch

    def timed_batch(*args, **kwargs):
        started_s = time.perf_counter()
        rows = batch(*args, **kwargs)
        seconds.append(time.perf_counter() - started_s)
        return rows

    run.dataset.batch = timed_batch
    return seconds


def merge_intervals(intervals: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the union of `intervals` in order, without overlap: kernels of two streams can overlap."""
    begin = end = None
    for first, last in sorted(intervals):
        if end is None or first > end:
            if end is not None:
                yield begin, end
            begin, end = first, last
        else:
            end = max(end, last)
    if end is not None:
        yield begin, end

"""A training step from inside: tokens per second, how busy the device is, what makes the host wait for it.

The steps are those of the training loop itself (`start_run`, `train_step`, `agree`), in this process, on
random token ids. Written for CUDA, and tried out on CPUs only: it has not been run on a GPU.
"""

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from random_tokens import write_random_tokens
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.training.loop import agree, train_step
from tinystories_slm.training.run import Run, start_run

# What makes the host wait for the device, by the names that the profiler has for it.
_SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_READ = "aten::_local_scalar_dense"  # a number read from a tensor: on a GPU each is a synchronisation
_WARM_UP_STEPS, _PROFILED_STEPS, _TIMED_S = 5, 5, 3.0


class Shape(Protocol):
    """What is asked of a shape here; `train.Shape` has it."""

    vocab_size: int
    seq_len: int
    micro_batches: tuple[int, ...]

    def flags(self, family: str) -> list[str]: ...


@dataclass(frozen=True)
class StepProfile:
    """One setting, measured; all zero where `problem` says why it could not be."""

    shape: str
    compiled: bool
    micro_batch: int
    """Windows in one forward, and in one step."""
    problem: str | None = None
    tokens_per_second: float = 0.0
    utilisation: float = 0.0
    """Of the device's published or measured peak, 0 to 1."""
    step_seconds: float = 0.0
    device_seconds: float = 0.0
    """Of a step, in which at least one kernel runs; 0 on a CPU."""
    input_seconds: float = 0.0
    """Of a step, that the host spends on the batch; the device waits for it only when it has run dry."""
    synchronisations: int = 0
    """A step: waits of the host for the device."""
    reads: int = 0
    """A step: numbers read from tensors."""
    kernels: int = 0
    """A step: kernels started; 0 on a CPU."""
    peak_bytes: int = 0
    """Of the device's memory, held by tensors; 0 on a CPU."""

    def cells(self) -> list[str]:
        """Of the table's line."""
        return [
            f"{self.tokens_per_second:,.0f}",
            f"{self.utilisation:.1%}",
            f"{self.device_seconds / self.step_seconds:.1%}" if self.kernels else "",
            f"{self.input_seconds / self.step_seconds:.1%}",
            f"{self.synchronisations} ({self.reads} numbers read)",
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
    """Every shape, compiled and eager, at each of its micro-batches; none is begun after `seconds`."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != found:  # the loop takes the best device there is, as for a user
        raise SystemExit(f"--device {device}: training would run on {found} here")
    until_s = time.perf_counter() + seconds
    rows = []
    for name, shape in shapes.items():
        data = write_random_tokens(scratch / name, vocab_size=shape.vocab_size, num_tokens=2**22)
        for is_compiled in compiled:
            for micro_batch in shape.micro_batches:
                if time.perf_counter() > until_s:
                    rows.append(StepProfile(name, is_compiled, micro_batch, problem="out of time"))
                    continue
                settings = {
                    "output_dir": scratch / f"run_{len(rows)}",
                    "train.batch_size": micro_batch,
                    "train.per_device_batch_size": micro_batch,
                    "train.compile": str(is_compiled).lower(),
                    "train.eval_stories": 1,
                }
                config = parse_config(
                    [
                        *data,
                        *shape.flags("gpt"),
                        *(f"--{key}={value}" for key, value in settings.items()),
                        *flags,
                    ]
                )
                rows.append(_profile(config, name, is_compiled, micro_batch))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _profile(config: RunConfig, name: str, compiled: bool, micro_batch: int) -> StepProfile:
    torch._dynamo.reset()  # what was compiled for another shape
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


def _measure(run: Run) -> dict[str, float | int]:
    for _ in range(_WARM_UP_STEPS):
        _step(run)
    one_s = _seconds(run, 1)
    input_s = _clock_input(run)
    num_steps = max(3, min(200, round(_TIMED_S / one_s)))
    step_s = _seconds(run, num_steps) / num_steps
    input_seconds = sum(input_s) / num_steps

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as profiled:
        _seconds(run, _PROFILED_STEPS)
    counts = {event.key: event.count for event in profiled.key_averages()}
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    ]
    # `_seconds` waits once itself; what is left of a division is that wait, not a step's.
    waits = sum(counts.get(key, 0) for key in _SYNCHRONISATIONS)
    tokens_per_second = run.tokens_per_step / step_s
    return {
        "tokens_per_second": tokens_per_second,
        "utilisation": run.utilisation(tokens_per_second),
        "step_seconds": step_s,
        # The profiler slows the host down, not the kernels: their time is held against a step without it.
        "device_seconds": sum(end - begin for begin, end in merged(kernels)) / 1e6 / _PROFILED_STEPS,
        "input_seconds": input_seconds,
        "synchronisations": waits // _PROFILED_STEPS,
        "reads": counts.get(_READ, 0) // _PROFILED_STEPS,
        "kernels": len(kernels) // _PROFILED_STEPS,
    }


def _step(run: Run) -> None:
    train_step(run)
    agree(run)


def _seconds(run: Run, num_steps: int) -> float:
    """That `num_steps` steps take, to the end of the last kernel."""
    _wait()
    began_s = time.perf_counter()
    for _ in range(num_steps):
        _step(run)
    _wait()
    return time.perf_counter() - began_s


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clock_input(run: Run) -> list[float]:
    """A list that grows by the seconds of each batch read from now on."""
    seconds, batch = [], run.windows.batch

    def clocked(*args, **kwargs):
        began_s = time.perf_counter()
        rows = batch(*args, **kwargs)
        seconds.append(time.perf_counter() - began_s)
        return rows

    run.windows.batch = clocked
    return seconds


def merged(intervals: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """`intervals` as ones that do not overlap, in order: kernels of two streams run at once."""
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

"""Measure how fast this machine trains a configuration: a few optimizer steps on random tokens."""

import statistics
import time
from collections.abc import Callable
from typing import Protocol

from tinystories_slm.config import RunConfig
from tinystories_slm.doctor.dry_run import StepTiming, TrialRun
from tinystories_slm.doctor.numerics import precision_or_fallback
from tinystories_slm.doctor.resources import needed_memory
from tinystories_slm.hardware.device import training_device
from tinystories_slm.model_costs import num_embedding_parameters, num_parameters
from tinystories_slm.planning.choice import Measurement
from tinystories_slm.training.runtime import resolve_per_device_batch_size

_NUM_STEPS = 5
_MAX_S = 1.5
"""Seconds for the steps of one configuration. A slow one has fewer steps, at least one after the warm-up."""


class Trial(Protocol):
    """Steps that can be timed."""

    def timed_step(self) -> StepTiming:
        """Run one step and return its timing."""


def measure(config: RunConfig) -> Measurement:
    """Return size, speed and memory of training with `config` on this machine, on one process."""
    device = training_device()
    precision = precision_or_fallback(config, device)
    num_rows = resolve_per_device_batch_size(config, device, precision=precision)
    trial = TrialRun(config, device, precision, num_rows=num_rows, seq_len=config.data.seq_len)
    step_s = measure_step(trial, num_micro_batches=config.train.batch_size / num_rows)
    model = trial.model.config
    return Measurement(
        num_parameters=num_parameters(model) - num_embedding_parameters(model),
        tokens_per_second=config.train.batch_size * config.data.seq_len / step_s,
        memory_bytes=needed_memory(config, device, precision, num_rows),
    )


def measure_step(
    trial: Trial, *, num_micro_batches: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of an optimizer step: the median, so that a stall of the machine does not count.

    The first step is a warm-up.
    """
    trial.timed_step()
    started_s, timings = clock(), []
    while len(timings) < _NUM_STEPS and (not timings or clock() - started_s < _MAX_S):
        timings.append(trial.timed_step())
    return statistics.median(num_micro_batches * one.backward_s + one.update_s for one in timings)

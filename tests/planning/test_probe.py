"""The measurement of a step, on a simulated clock: fast, slow and stalled machines."""

import pytest

from tinystories_slm.doctor.dry_run import StepTiming
from tinystories_slm.planning.probe import measure, measure_step


class Clock:
    """A machine whose steps take the given seconds, the last value for ever."""

    def __init__(self, *step_s: float) -> None:
        self.step_s, self.now, self.num_steps = list(step_s), 0.0, 0

    def __call__(self) -> float:
        return self.now

    def timed_step(self) -> StepTiming:
        seconds = self.step_s[min(self.num_steps, len(self.step_s) - 1)]
        self.num_steps += 1
        self.now += seconds
        return StepTiming(backward_s=0.75 * seconds, update_s=0.25 * seconds, kernel_s=0, page_faults=0)


@pytest.mark.parametrize(
    ("step_s", "expected", "num_steps"),
    [((9, 0.01), 0.01, 6), ((9, 1.0), 1.0, 3), ((30, 20.0), 20.0, 2), ((1, 0.1, 9.0, 0.1), 4.55, 3)],
    ids=["fast", "slow", "very slow", "stalled for a long time"],
)
def test_slow_machines_run_fewer_steps(step_s, expected, num_steps):
    clock = Clock(*step_s)
    assert measure_step(clock, num_micro_batches=1, clock=clock) == pytest.approx(expected)
    assert clock.num_steps == num_steps


def test_one_stall_does_not_count():
    clock = Clock(9, 0.1, 0.9, 0.1)
    assert measure_step(clock, num_micro_batches=1, clock=clock) == pytest.approx(0.1)
    clock = Clock(1.0)
    assert measure_step(clock, num_micro_batches=4, clock=clock) == pytest.approx(4 * 0.75 + 0.25)


def test_a_real_model_is_measured(tiny_run):
    one = measure(tiny_run())
    assert one.num_parameters == 6_224
    assert one.tokens_per_second > 0
    assert one.memory_bytes > 700e6

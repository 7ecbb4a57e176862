import pytest
from nanogpt import Iteration
from time_to_quality import CHECKPOINTS, iterations_between, training_seconds


def printed(step_s: float, number: int, *, starting_s: float, every: int, beside_s: float) -> list[Iteration]:
    """What nanoGPT prints where each step takes `step_s` and an evaluation `beside_s` more."""
    at_s, lines = starting_s, []
    for i in range(number):
        took = step_s + beside_s * (i % every == 0)
        at_s += took
        lines.append(Iteration(i, 2.0, took, at_s))
    return lines


def test_evaluations_are_taken_off_its_time():
    lines = printed(0.5, 41, starting_s=4.0, every=10, beside_s=3.0)
    finished_at = training_seconds(lines, every=10)
    assert [finished_at[n] for n in (10, 20, 40)] == pytest.approx([9.0, 14.0, 24.0])


def test_its_cosine_ends_on_time():
    probe = printed(0.5, 12, starting_s=4.0, every=10**6, beside_s=1.0)
    every = iterations_between(probe, seconds=600.0)
    run = printed(0.5, every * CHECKPOINTS + 1, starting_s=5.0, every=every, beside_s=1.0)
    assert training_seconds(run, every)[every * CHECKPOINTS] == pytest.approx(600.0, abs=5.0)

"""Checkpoint retention: steps that stay, steps that are saved in addition, and their number."""

from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.config.sections import CheckpointArgs
from tinystories_slm.training.loop import train
from tinystories_slm.training.retention import RETENTION_RULES, max_checkpoints, steps_to_delete

ARGS = st.builds(
    CheckpointArgs,
    save_every=st.integers(1, 12),
    keep_checkpoints=st.integers(1, 4),
    retention=st.sampled_from(sorted(RETENTION_RULES)),
)


def test_newest_deletes_older_and_damaged_later_checkpoints():
    args = CheckpointArgs(keep_checkpoints=2)
    assert steps_to_delete([10, 20, 30, 40, 50], 40, args) == [50, 10, 20]


@given(args=ARGS, max_steps=st.integers(1, 60))
def test_the_estimate_counts_what_a_run_keeps(args, max_steps):
    saves = RETENTION_RULES[args.retention].saves
    steps, largest = [], 0
    for step in range(1, max_steps + 1):
        if step % args.save_every == 0 or step == max_steps or saves(step):
            steps.append(step)
            steps = [kept for kept in steps if kept not in steps_to_delete(steps, step, args)]
            largest = max(largest, len(steps))
    assert len(steps) == largest == max_checkpoints(args, max_steps)
    assert steps[-1] == max_steps


def test_a_run_keeps_powers_of_two_and_the_newest(tiny_run):
    run_dir = train(tiny_run("--train.retention", "powers_of_two", "--train.keep_checkpoints", "1"))
    kept = sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())
    assert kept == [1, 2, 4, 8, 12]

"""Kept steps: the rules, their numbers, and a run that is stopped, killed, resumed and branched."""

import shutil
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training.helpers import assert_equal_tensors, assert_same_run, load_weights, train_with_stops

from tinystories_slm.config.sections import CheckpointArgs, ScheduleArgs
from tinystories_slm.errors import UserError
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.runs.run_dir import RunDir, read_json_object
from tinystories_slm.training import loop, train
from tinystories_slm.training.checkpoints import checkpoint_step, checkpoints
from tinystories_slm.training.retention import (
    KeptSteps,
    count_kept,
    max_reachable_steps,
    steps_to_delete,
)

RULES = st.sampled_from(
    ["newest:1", "newest:3", "all", "all:full", "log", "log:full", "every:5", "every:7:full"]
)
ARGS = st.builds(
    CheckpointArgs,
    save_every=st.integers(1, 12),
    keep=st.lists(st.one_of(RULES, st.integers(0, 70).map(str)), max_size=3).map(",".join),
)
LOG_STEPS = [0, 1, 2, 4, 8]


def test_newest_deletes_older_and_damaged_later_checkpoints():
    args = CheckpointArgs(keep="newest:2")
    assert steps_to_delete([10, 20, 30, 40, 50], 40, args) == [50, 10, 20]


@pytest.mark.parametrize(
    "text",
    ["newest", "newest:0", "newest:2:full", "every", "every:0", "every:-3", "logs", "log:2", "1.5", "-1"],
)
def test_a_part_that_is_no_rule_is_named(text):
    with pytest.raises(UserError, match=rf"train.keep \(log,{text}\): {text} must be newest:N, every:N"):
        KeptSteps.parse(f"log,{text}")


@given(args=ARGS, num_steps=st.integers(1, 60))
def test_the_estimate_counts_what_a_run_keeps(args, num_steps):
    kept = KeptSteps.parse(args.keep)
    steps, models, largest = [], set(), 0
    for step in range(num_steps + 1):
        is_due = step > 0 and (step % args.save_every == 0 or step == num_steps)
        if kept.keeps_model(step, is_saved=is_due):
            models.add(step)
        if is_due or kept.saves_checkpoint(step):
            steps.append(step)
            steps = [kept for kept in steps if kept not in steps_to_delete(steps, step, args)]
            largest = max(largest, len(steps))
    counts = count_kept(args, num_steps)
    assert (len(steps), len(models)) == (counts.checkpoints, counts.models) and largest == len(steps)
    assert steps[-1] == num_steps


def test_a_time_limit_bounds_the_steps_at_peak_flops():
    args = ScheduleArgs(max_steps=1000, max_minutes=0.5)
    assert max_reachable_steps(args, step_flops=1e9, flops_per_second=1e10) == 300
    assert max_reachable_steps(args, step_flops=1e9, flops_per_second=1e12) == 1000
    assert max_reachable_steps(ScheduleArgs(max_steps=7), step_flops=1e9, flops_per_second=1.0) == 7


def kept_steps(run_dir) -> list[int]:
    return list(RunDir(run_dir).kept_steps())


def test_kept_steps_are_models_of_their_step_and_change_no_bit(tiny_run, caplog):
    plain = train(tiny_run(name="plain"))
    run_dir = train(tiny_run("--train.keep", "newest:1,log,8:full,12:full", "--model.dropout", "0"))

    assert_same_run(plain, run_dir)
    assert kept_steps(run_dir) == [*LOG_STEPS, 12]
    assert [checkpoint_step(folder) for folder in checkpoints(run_dir)] == [8, 12]
    assert any("kept: 2 checkpoints of" in line and "6 model folders" in line for line in caplog.messages)
    steps = RunDir(run_dir)
    assert_equal_tensors(load_weights(steps.step(12)), load_weights(steps.last))
    assert_equal_tensors(load_weights(steps.step(8)), load_weights(checkpoints(run_dir)[0]))
    initial, _ = load_model_folder(str(steps.step(0)), device="cpu")
    assert initial.config.training_step == 0
    assert initial.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not hasattr(initial.config, "ema_decay")


def test_a_stopped_run_keeps_the_same_steps_bit_by_bit(tiny_run, monkeypatch):
    flags = ("--train.keep", "log,0:full", "--train.ema_decay", "0.9")
    whole = train(tiny_run(*flags, name="whole"))
    stops = {3: signal.SIGTERM, 8: signal.SIGINT}
    pieces = train_with_stops(tiny_run(*flags, name="pieces"), monkeypatch, stops)

    assert kept_steps(whole) == kept_steps(pieces) == LOG_STEPS
    for step in LOG_STEPS:
        one, other = (RunDir(run).step(step) for run in (whole, pieces))
        assert_equal_tensors(load_weights(one), load_weights(other))
        # The folder holds the average, as best/ and last/ do.
        assert read_json_object(one / "config.json")["ema_decay"] == 0.9
    raw = load_weights(checkpoints(whole)[-1])
    assert any(not raw[name].equal(weight) for name, weight in load_weights(whole / "last").items())


@pytest.mark.parametrize("partial", [False, True], ids=["after the folder", "within the folder"])
def test_a_kill_between_step_folder_and_checkpoint_is_harmless(partial, tiny_run, monkeypatch, fault):
    whole = train(tiny_run("--train.keep", "log", name="whole"))
    config, save = tiny_run("--train.keep", "log"), loop.save

    def killed_save(run):
        if run.progress.step == 8:
            if partial:
                folder = RunDir(config.output_dir).step(8)
                folder.rename(folder.with_name("step_000008.partial"))
            raise SystemExit("killed")
        save(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(loop, "save", killed_save)
        train(config)
    assert kept_steps(config.output_dir) == LOG_STEPS[: 4 if partial else 5]
    limited = tiny_run("--train.keep", "newest:2")  # it does not keep step 8, and the one on disk is removed
    removed = shutil.copytree(config.output_dir, config.output_dir.with_name("limited"))
    train(tiny_run("--train.keep", limited.train.keep, name="limited"))
    assert kept_steps(removed) == LOG_STEPS[:4]
    train(config)

    assert kept_steps(config.output_dir) == LOG_STEPS
    assert sorted(path.name for path in RunDir(config.output_dir).steps.iterdir()) == [
        f"step_{step:06d}" for step in LOG_STEPS
    ]
    for step in LOG_STEPS:
        one, other = (RunDir(run).step(step) for run in (whole, config.output_dir))
        assert_equal_tensors(load_weights(one), load_weights(other))
    fault(
        "SIGKILL between a kept step and its checkpoint",
        "the resumed run writes the step again, bit-identical",
    )


def test_a_branch_has_the_steps_before_it_once(tiny_run):
    trunk = train(tiny_run("--train.keep", "newest:3,every:3", name="trunk"))
    flags = ("--train.resume", str(trunk / "checkpoints" / "step_000004"), "--train.keep", "every:2")
    branch = train(tiny_run(*flags, name="branch"))
    assert kept_steps(trunk) == [0, 3, 6, 9, 12]
    assert kept_steps(branch) == [0, 3, 6, 8, 10, 12]  # from step 5 on by its own rule

    train(tiny_run("--train.resume", "never", name="trunk"))
    assert kept_steps(trunk) == []


def test_a_checkpoint_of_step_0_can_be_branched_from(tiny_run):
    trunk = train(tiny_run("--train.keep", "log:full", name="trunk"))
    assert [checkpoint_step(folder) for folder in checkpoints(trunk)] == [*LOG_STEPS, 12]
    flags = ("--train.resume", str(trunk / "checkpoints" / "step_000000"), "--train.keep", "log:full")
    assert_same_run(trunk, train(tiny_run(*flags, name="branch")))

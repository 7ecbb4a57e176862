"""Sharded checkpoints, which FSDP2 processes write in the background: complete or absent."""

import re
import shutil

import pytest
from training.helpers import assert_equal_tensors, assert_same_run, load_weights, read_series
from training.sharded_runs import assert_close_runs, assert_same_shards, train_sharded

from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoint_step, checkpoints, verify_checkpoint
from tinystories_slm.training.sharded_checkpoints import SHARDS

FLAGS = (
    *("--train.per_device_batch_size", "1", "--train.batch_size", "12", "--train.eval_stories", "12"),
    *("--train.optimizer", "muon", "--train.ema_decay", "0.9"),
)
SHARDED = ("--train.sharded_checkpoints", "true")

# What the processes do when they write the checkpoint of a step.
PROGRAM = """
import errno, os, signal, time
from training import fsdp2_on_cpu
from tinystories_slm.training import loop, sharded_checkpoints

Writer = sharded_checkpoints._ShardWriter
write_data, finish, train_step = Writer.write_data, Writer.finish, loop.train_step
rank, steps = os.environ["RANK"], [0]

def counted_step(run):
    steps[0] = run.progress.step
    return train_step(run)

def faulty_write(self, plan, planner):
    step = int(self.path.parent.name[5:11])
    WRITE
    return write_data(self, plan, planner)

def faulty_finish(self, metadata, results):
    step = int(self.path.parent.name[5:11])
    FINISH
    finish(self, metadata, results)

loop.train_step, Writer.write_data, Writer.finish = counted_step, faulty_write, faulty_finish
fsdp2_on_cpu.main()
"""
FULL_DISK = "raise OSError(errno.ENOSPC, 'No space left on device', str(self.path))"
NEVER = "pass"


@pytest.fixture
def program(tmp_path):
    def write(*, write: str = NEVER, finish: str = NEVER):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("WRITE", write).replace("FINISH", finish))
        return path

    return write


def saved_steps(config) -> list[int]:
    return [checkpoint_step(folder) for folder in checkpoints(config.output_dir)]


@pytest.mark.slow
def test_four_processes_save_and_two_three_and_one_resume(tiny_run):
    forms = {"sharded": SHARDED, "whole": ()}
    flags = (*FLAGS, "--train.max_steps", "8")
    for name, form in forms.items():
        codes, errors = train_sharded(tiny_run(*flags, *form, name=name), 4, STOP_AT="3")
        assert codes == [75] * 4, errors
    saved = {name: tiny_run(name=name).output_dir for name in forms}
    files = {path.name for path in (checkpoints(saved["sharded"])[0] / SHARDS).iterdir()}
    assert files == {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in range(1, 5)}

    alone = train(tiny_run(*flags, name="alone"))
    for num_processes in (3, 2):
        copy = tiny_run(*flags, *SHARDED, name=f"resumed_by_{num_processes}")
        shutil.copytree(saved["sharded"], copy.output_dir)
        codes, errors = train_sharded(copy, num_processes)
        assert codes == [0] * num_processes and "resumed at step 4" in errors, errors
        assert read_series(copy.output_dir, "val/loss") == pytest.approx(
            read_series(alone, "val/loss"), rel=1e-4
        )
        assert read_series(copy.output_dir, "train/loss") == pytest.approx(
            read_series(alone, "train/loss"), rel=1e-4
        )
    # One process without FSDP2 reads the same state from both forms, and saves whole checkpoints.
    for name in forms:
        train(tiny_run(*flags, name=name))
    assert_same_run(saved["sharded"], saved["whole"])
    assert_close_runs(saved["sharded"], alone, rel=1e-3)


@pytest.mark.slow
def test_checkpoint_before_the_first_step_changes_nothing(tiny_run):
    flags = (*FLAGS, *SHARDED, "--train.max_steps", "4")
    for name, keep in (("plain", "newest:2"), ("kept", "0:full,newest:2")):
        codes, errors = train_sharded(tiny_run(*flags, "--train.keep", keep, name=name), 2)
        assert codes == [0, 0], errors
    assert saved_steps(tiny_run(name="kept")) == [0, *saved_steps(tiny_run(name="plain"))]
    assert_same_shards(tiny_run(name="plain").output_dir, tiny_run(name="kept").output_dir)


@pytest.mark.weekly
def test_steps_go_on_while_a_checkpoint_is_written(tiny_run, program):
    waits = (
        "start_s = time.monotonic()\n"
        "    while step == 4 and steps[0] < 7:\n"
        "        assert time.monotonic() < start_s + 60\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(7 if step == 12 and rank == '1' else 0)"
    )
    plain = tiny_run(*FLAGS, *SHARDED, name="plain")
    slow = tiny_run(*FLAGS, *SHARDED, "--train.timeout_s", "5", name="slow")
    assert train_sharded(plain, 2)[0] == [0, 0]
    codes, errors = train_sharded(slow, 2, program=program(write=waits))

    assert codes == [0, 0], errors
    assert "no progress" not in errors  # of the watchdog
    assert saved_steps(slow) == [8, 12]
    assert [verify_checkpoint(folder) for folder in checkpoints(slow.output_dir)] == [None, None]
    for _ in range(2):  # step 12, then step 8, which was copied before the later steps
        assert_same_shards(plain.output_dir, slow.output_dir)
        for config in (plain, slow):
            shutil.rmtree(checkpoints(config.output_dir)[-1])


def test_a_process_killed_within_a_write_leaves_the_earlier_checkpoint(tiny_run, program, fault):
    killed = (
        "if step == 8 and rank == '1':\n"
        "        (self.path / 'shard-00002-model-00001-of-00001.safetensors').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    whole, config = tiny_run(*FLAGS, *SHARDED, name="whole"), tiny_run(*FLAGS, *SHARDED)
    assert train_sharded(whole, 2)[0] == [0, 0]
    codes, errors = train_sharded(config, 2, program=program(write=killed))
    assert codes == [69, -9] and saved_steps(config) == [4], errors
    assert (config.output_dir / "checkpoints" / "step_000008.partial").is_dir()

    assert train_sharded(config, 2)[0] == [0, 0]
    assert saved_steps(config) == [8, 12]
    assert not list((config.output_dir / "checkpoints").glob("*.partial"))
    for name in ("best", "last"):
        assert_equal_tensors(load_weights(config.output_dir / name), load_weights(whole.output_dir / name))
    assert_same_shards(whole.output_dir, config.output_dir)
    fault(
        "SIGKILL to one of two FSDP2 processes while it writes its part of a sharded checkpoint",
        "the launch ends with 69, the earlier checkpoint stands, and the resumed run is bit-identical",
    )


@pytest.mark.parametrize("place", ["write", "finish"])
def test_a_failed_write_ends_the_run_with_one_line(place, tiny_run, program, fault):
    rank = {"write": "1", "finish": "0"}[place]
    config = tiny_run(*FLAGS, *SHARDED)
    script = program(**{place: f"if step == 8 and rank == '{rank}': {FULL_DISK}"})
    codes, errors = train_sharded(config, 2, program=script)

    assert codes == [2, 2] and saved_steps(config) == [4], errors
    [line] = re.findall(r"^error: .*", errors, re.MULTILINE)
    assert re.fullmatch(
        rf"error: output_dir \(.*run\) can no longer be written to: process {rank}, checkpoint step_000008: "
        r"\[Errno 28\] No space left on device: .*; free disk space or .*; run the same command to resume",
        line,
    )
    assert "Traceback" not in errors
    fault(
        "the disk is full while FSDP2 processes write a sharded checkpoint",
        "one line names the process and the checkpoint (exit code 2); the earlier checkpoint stands",
    )


def test_missing_model_folders_are_written_from_shards(tiny_run):
    config = tiny_run(*FLAGS, *SHARDED)
    assert train_sharded(config, 2)[0] == [0, 0]
    last = config.output_dir / "last"
    before = load_weights(last)
    shutil.rmtree(last)
    train(config)
    assert_equal_tensors(load_weights(last), before)


def test_option_has_no_effect_without_fsdp2(tiny_run, caplog):
    run_dir = train(tiny_run(*SHARDED))
    assert "train.sharded_checkpoints (True) has no effect" in caplog.text
    assert not (checkpoints(run_dir)[-1] / SHARDS).exists()

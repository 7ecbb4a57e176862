"""What can go wrong while nobody watches, made to happen; see docs/reliability.md for the table."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from tinystories_slm.config import save_config
from tinystories_slm.errors import InputError, Stopped
from tinystories_slm.training import checkpoints as checkpoint_files
from tinystories_slm.training import finished, loop, train
from tinystories_slm.training.checkpoints import checkpoints, damage_of, read_progress, step_of
from tinystories_slm.training.run import Run, start_run
from tinystories_slm.training.watching.tracking import read_metrics


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit flipped": lambda path: path.write_bytes(
        (data := path.read_bytes())[:300] + bytes([data[300] ^ 1]) + data[301:]
    ),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "checkpoint.json"])
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_is_used(
    damage, name, tiny_run, caplog, fault
):
    run_dir = train(tiny_run())
    whole = weights(run_dir / "last")
    damage(run_dir / "checkpoints" / "step_000012" / name)
    assert not finished(tiny_run())
    caplog.clear()
    train(tiny_run())

    assert "step_000012 is damaged" in caplog.text
    assert "resumed at step 8" in caplog.text
    assert damage_of(run_dir / "checkpoints" / "step_000012") is None
    assert_equal(weights(run_dir / "last"), whole)
    fault(
        "a file of the newest checkpoint is truncated, a bit of it is flipped, or it is gone",
        "its checksum tells; a warning, and the checkpoint before it is used: the same model to the bit",
    )


def test_no_bit_of_where_the_run_stood_may_flip(tiny_run):
    folder = checkpoints(train(tiny_run("--train.max_steps", "5", "--train.log_every", "3")))[-1]
    path = folder / "checkpoint.json"
    whole, progress = path.read_bytes(), read_progress(folder)
    assert damage_of(folder) is None
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        # The seventeenth digit of a number may change and the number not.
        assert damage_of(folder) or read_progress(folder) == progress, whole[: i + 1]


def test_a_damaged_checkpoint_does_not_push_out_the_good_ones(tiny_run, monkeypatch):
    run_dir = train(tiny_run())
    (run_dir / "checkpoints" / "step_000012" / "optimizer.bin").write_bytes(b"garbage")
    train_step = loop.train_step

    def interrupted_step(run):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    for keep, left in ((2, [8, 9]), (1, [10])):
        with pytest.raises(Stopped):
            train(tiny_run("--train.keep_checkpoints", str(keep)))
        assert [step_of(folder) for folder in checkpoints(run_dir)] == left


def test_with_every_checkpoint_damaged_nothing_is_thrown_away(tiny_run, fault):
    run_dir = train(tiny_run())
    for folder in checkpoints(run_dir):
        (folder / "optimizer.bin").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged; .*--train.resume never"):
        train(tiny_run())

    assert len(checkpoints(run_dir)) == 2 and (run_dir / "best").is_dir()
    fault("every checkpoint is damaged", "refused by name, nothing deleted (exit code 2)")


def test_a_pickle_of_unknown_origin_is_not_run(tiny_run, tmp_path, monkeypatch, fault):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    folder = run_dir / "checkpoints" / "step_000008"
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    record = json.loads((folder / "checkpoint.json").read_text())
    record["sha256"] = checkpoint_files._sha256_of_files(folder)  # whoever forges the files forges these too
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"step_000008 does not fit this run or is damaged"):
        train(tiny_run())

    assert not (tmp_path / "executed").exists()
    fault("a checkpoint's files are replaced by pickles that run code", "refused, the code does not run")


@pytest.mark.parametrize("read", ["each step", "when it logs"])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tiny_run, monkeypatch, caplog, fault, read):
    # A GPU is not waited for: it skips by itself, and the loop reads that it did when it logs.
    monkeypatch.setattr(Run, "reads_each_step", read == "each step")
    train_step, seen = loop.train_step, []

    def poisoned_step(run):
        bad = run.progress.step + 1 in (5, 6)
        hook = (
            run.model.model.norm.register_forward_hook(lambda *call: call[2] * float("nan")) if bad else None
        )
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        update = train_step(run)
        if hook:
            hook.remove()
            loop._catch_up(run)
            seen.append(run.progress.skipped_in_a_row)
            assert_equal(run.model.state_dict(), before)
            [optimizer] = run.optimizers
            assert {int(state["step"]) for state in optimizer.state.values()} == {4}
        return update

    monkeypatch.setattr(loop, "train_step", poisoned_step)
    run_dir = train(tiny_run(name="poisoned"))

    assert seen == [1, 2]
    assert read_progress(checkpoints(run_dir)[-1]).skipped_steps == 2
    assert "step 5: loss or gradient is not finite, step skipped" in caplog.text
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert {line["step"]: line["train/skipped_steps"] for line in lines}[12] == 2
    assert [line["step"] for line in lines] == [1, 2, 3, 4, *range(7, 13)]
    assert all(line["train/loss"] < 7 for line in lines)
    fault("a NaN in the loss of single steps", "the steps change nothing, are counted, and the run goes on")


def test_a_run_that_gives_nan_for_good_ends_with_the_knob_to_turn(tiny_run, fault):
    flags = ("--train.lr", "1e20", "--train.max_grad_norm", "1e30", "--train.max_skipped_in_a_row", "3")
    with pytest.raises(InputError) as refusal:
        train(tiny_run(*flags, "--train.save_every", "1"))

    message = str(refusal.value)
    assert message.startswith("3 steps in a row, to step ") and "lower train.lr (1e+20)" in message
    for folder in checkpoints(tiny_run().output_dir):
        assert read_progress(folder).skipped_in_a_row == 0  # none was saved in the trouble
    fault(
        "a learning rate that blows the weights up: NaN from some step on",
        "ends after train.max_skipped_in_a_row steps, names the knobs, saves nothing meanwhile (exit code 2)",
    )


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.md"])
def test_killed_as_it_resumes_a_run_loses_nothing(name, tiny_run, monkeypatch, fault):
    run_dir = train(tiny_run())
    told = {name: (run_dir / name).read_text() for name in ("config.yaml", "samples.md")}
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    write_text = Path.write_text

    def killed(path: Path, text: str, **how) -> int:
        if path.name.startswith(name):
            write_text(path, "", **how)
            raise SystemExit("killed")
        return write_text(path, text, **how)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(Path, "write_text", killed)
        train(tiny_run())
    train(tiny_run())

    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {name: (run_dir / name).read_text() for name in told} == told
    fault(
        "killed while a resumed run rewrites its record",
        "the old file or the new one is there, whole; the same command goes on",
    )


def test_a_second_run_in_one_folder_is_refused(tiny_run, fault):
    first = start_run(tiny_run())
    with pytest.raises(InputError, match=r"output_dir \(.*\) is in use: another process trains there"):
        train(tiny_run("--train.resume", "never"))
    first.close()
    train(tiny_run())
    fault(
        "a second run is started in the same output folder", "refused (exit code 2); the first is untouched"
    )


def test_the_tokens_vanish_under_a_run(data_dir, tiny_run, tmp_path, monkeypatch, fault):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    whole = train(tiny_run(name="whole"))
    flags = ("--data.data_dir", str(folder))
    train_step = loop.train_step

    def vanishing(run):
        if run.progress.step == 5:
            for path in folder.glob("*.bin"):
                path.unlink()
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", vanishing)
    with pytest.raises(InputError, match=r"data.data_dir \(.*\) cannot be read any more: .*train.bin"):
        train(tiny_run(*flags))
    monkeypatch.undo()
    run_dir = train(tiny_run(*flags))

    assert_equal(weights(run_dir / "last"), weights(whole / "last"))
    fault(
        "the token files are deleted under a run",
        "ends, says so (exit code 2); the same command makes them again, the same ones, and goes on",
    )


def test_other_tokens_under_the_same_name_are_refused(data_dir, tiny_run, tmp_path, monkeypatch, fault):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    flags = ("--data.data_dir", str(folder))
    run_dir = train(tiny_run(*flags))
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    tokens = folder / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"train.bin"):
        train(tiny_run(*flags))
    fault("a token file is truncated between two sessions", "refused by name (exit code 2)")


def test_the_time_limit_ends_a_run_in_order(tiny_run, monkeypatch, fault):
    monkeypatch.setattr(Run, "seconds", property(lambda run: 1.0 * run.progress.step))  # a step a second
    flags = ("--train.max_steps", "100000", "--train.max_minutes", "0.5", "--train.min_lr_rate", "0")
    whole = train(tiny_run(*flags, name="whole"))
    config = tiny_run(*flags, name="pieces")
    train_step, waiting = loop.train_step, {11, 18}

    def interrupted_step(run):
        if run.progress.step + 1 in waiting:
            waiting.remove(run.progress.step + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(config)
    pieces = train(config)

    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "train/lr" in line]
    rates = {line["step"]: line["train/lr"] for line in lines}
    assert 26 <= max(rates) <= 30  # the last evaluation and the last save are paid for in advance
    decay = [rates[step] for step in range(3, max(rates) + 1)]
    assert decay == sorted(decay, reverse=True) and decay[-1] < 0.02 * decay[0]
    assert finished(tiny_run(*flags, name="whole")) and finished(config)
    assert read_metrics(whole / "metrics.jsonl")[-1].get("val/loss")
    again = [line for line in read_metrics(pieces / "metrics.jsonl") if "train/lr" in line]
    assert [line["step"] for line in again] == list(range(1, len(again) + 1))
    decay = [line["train/lr"] for line in again[2:]]
    assert decay == sorted(decay, reverse=True) and decay[-1] < 0.02 * decay[0]
    fault("train.max_minutes is over", "the decayed end of the schedule; evaluated, saved, exit code 0")


def test_a_resumed_run_knows_what_its_end_will_take(tiny_run):
    run_dir = train(tiny_run())
    shutil.rmtree(run_dir / "checkpoints" / "step_000012")
    run = start_run(tiny_run())
    run.close()
    assert run.progress.evaluation_seconds > 0 and run.progress.saving_seconds > 0
    assert run.closing_seconds == run.progress.evaluation_seconds + run.progress.saving_seconds


def test_a_full_disk_a_read_only_folder_and_too_little_memory(tiny_run, tmp_path, fault):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "t", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("this system lets nobody make a file system of his own (unshare -rm, mount)")
    save_config(tiny_run("--train.max_steps", "60", "--train.save_every", "2"), tmp_path / "config.yaml")
    (tmp_path / "disk").mkdir()
    script = Path(__file__).with_name("machine_faults.py")
    command = ["unshare", "-rm", sys.executable, script, tmp_path / "config.yaml", tmp_path / "disk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])

    full = report["full disk"]
    assert "cannot be written to any more" in full["refusal"] and "free some space" in full["refusal"]
    assert "No space left" in full["refusal"] or "space" in full["refusal"]
    assert "cannot be written to any more" in full["no start"] and "No space left" in full["no start"]
    assert full["intact"] == full["found"] and len(full["intact"]) >= 2
    assert full["end"][-1] == "step_000060"
    fault(
        "the disk is full in the middle of a checkpoint",
        "says so (exit code 2), finished checkpoints are whole; with space again the same command goes on",
    )
    read_only = report["read-only"]
    assert "Read-only file system" in read_only["refusal"] and read_only["end"][-1] == "step_000060"
    fault("the output folder becomes read-only under a run", "as a full disk")
    assert "out of memory; halve train.per_device_batch_size (32768)" in report["out of memory"]["refusal"]
    fault("the batch does not fit the memory", "says which knob to halve (exit code 2)")


# Its second step lasts until it is asked to stop; with FOR_EVER, until it has to.
WAITS_IN_A_STEP = """
import os, time
from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def waiting(run):
    while run.progress.step == 1 and (run.stop.received is None or "FOR_EVER" in os.environ):
        time.sleep(0.01)
    return train_step(run)

loop.train_step = waiting
doorway(loop.train, RunConfig)
"""


def test_ctrl_c_once_saves_and_twice_stops_now(tiny_run, tmp_path, fault):
    save_config(tiny_run(), tmp_path / "config.yaml")
    (tmp_path / "waits.py").write_text(WAITS_IN_A_STEP)
    codes = {}
    for times in (1, 2):
        output_dir = tmp_path / f"run{times}"
        command = [sys.executable, tmp_path / "waits.py", "--config", tmp_path / "config.yaml"]
        process = subprocess.Popen(
            [*command, f"--output_dir={output_dir}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | ({"FOR_EVER": "1"} if times == 2 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (output_dir / "metrics.jsonl").exists() or not (output_dir / "metrics.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if times == 2:
            time.sleep(1.2)  # what comes sooner is the same Ctrl-C, passed on by a launcher
            process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=100)[1]
        codes[times] = process.returncode
        assert "SIGINT: finishing the step, then saving" in told
        assert "Traceback" not in told
        assert [folder.name for folder in checkpoints(output_dir)] == ["step_000002"][: 2 - times]

    assert codes == {1: 75, 2: 130}
    fault("Ctrl-C", "the step is finished and saved: exit code 75")
    fault("Ctrl-C, and again", "stops at once: exit code 130; what was saved before is whole")


def test_whoever_reads_the_log_is_gone(tiny_run, tmp_path, fault):
    flags = ("--train.max_steps", "100000", "--train.save_every", "100000", "--train.eval_every", "20")
    config = tiny_run(*flags)
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", tmp_path / "config.yaml"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    metrics = config.output_dir / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.stderr.close()
    evaluations = metrics.read_text().count("val/loss")
    while metrics.read_text().count("val/loss") < evaluations + 2:  # each is told
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=100) == 75
    assert len(checkpoints(config.output_dir)) == 1
    fault(
        "whoever reads the log ends, then Ctrl-C (`| tee` in a terminal)",
        "the run goes on in silence; the step is finished and saved: exit code 75",
    )

"""Runs of several processes, joined by gloo on the loopback interface."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from script_process import run_forked
from training.helpers import start_two_processes

from tinystories_slm.config import save_config
from tinystories_slm.errors import UserError
from tinystories_slm.model.modeling_tinystories import TinyStoriesDecoderLayer
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoint_step, checkpoints
from tinystories_slm.training.distributed import build_accelerator
from tinystories_slm.training.run import start_run

CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CPU_2 = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")]
TORCHRUN = ["torch.distributed.run", "--standalone"]
TRAIN = ROOT / "scripts" / "train.py"

# The second process is killed at its seventh step.
KILLED_PROCESS = """
import os, signal
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def killed_step(run):
    if run.progress.step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run)

loop.train_step = killed_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


# Only the second process runs out of memory.
OUT_OF_MEMORY = """
import os
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def out_of_memory_step(run):
    if run.progress.step == 6 and os.environ["RANK"] == "1":
        raise MemoryError("simulated")
    return train_step(run)

loop.train_step = out_of_memory_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


# All processes are signaled at the seventh step, as by srun; the main process waits for the signal.
SIGNAL_TO_ALL_TASKS = """
import os, signal, time
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def signalled_step(run):
    if run.progress.step == 6 and os.environ["RANK"] == "0":
        os.killpg(os.getpgrp(), signal.SIGUSR1)
        while run.stop.received is None:
            time.sleep(0.01)
    return train_step(run)

loop.train_step = signalled_step
run_command(loop.train, RunConfig, is_distributed=True)
"""


def launch(launcher: list[str], script: Path, config_file: Path, *flags: str) -> subprocess.CompletedProcess:
    command = ["-m", *launcher, script, "--config", config_file, *flags]
    return run_forked(command, ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def curves(run_dir: Path) -> dict[str, list[float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {
        name: [line[name] for line in lines if name in line]
        for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss")
    }


def test_two_processes_train_like_one(tiny_run, tmp_path):
    # With EMA, each process scores its share of the stories with its own average.
    config = tiny_run("--train.per_device_batch_size", "4", "--train.ema_decay", "0.9", name="alone")
    alone = curves(train(config))
    save_config(config, tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml", f"--output_dir={tmp_path / 'run'}")

    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith(f"run complete: all 12 steps saved in {tmp_path}")
    plan = re.findall(r"processes: (\d) on cpu.*, (\d) micro-batch", done.stderr)
    assert plan == [("2", "1")]  # logged once; a single process needs two micro-batches
    assert len(alone["train/loss"]) == len(alone["train/grad_norm"]) == 12
    for name, values in curves(tmp_path / "run").items():
        assert values == pytest.approx(alone[name], rel=1e-4), name


def test_killed_process_ends_the_job_and_one_process_resumes(tiny_run, tmp_path, fault):
    flags = ("--train.per_device_batch_size", "4", "--train.optimizer", "muon")
    config = tiny_run(*flags)
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "killed_process.py"
    script.write_text(KILLED_PROCESS)
    done = launch(CPU_2, script, tmp_path / "config.yaml")

    assert done.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", done.stderr), done.stderr
    assert [checkpoint_step(folder) for folder in checkpoints(config.output_dir)] == [4]
    # Resume with another number of processes.
    resumed, whole = curves(train(config)), curves(train(tiny_run(*flags, name="whole")))
    assert len(resumed["train/loss"]) == 12
    for name, values in resumed.items():
        assert values == pytest.approx(whole[name], rel=1e-3), name
    fault(
        "SIGKILL to one of two processes",
        "the launcher ends the other and reports it; one process resumes the last checkpoint",
    )


def test_error_of_any_process_is_logged(tiny_run, tmp_path, fault):
    config = tiny_run("--train.per_device_batch_size", "4")
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "out_of_memory.py"
    script.write_text(OUT_OF_MEMORY)
    done = launch(CPU_2, script, tmp_path / "config.yaml")

    assert done.returncode == 1
    assert done.stderr.count("process 1: out of memory; halve train.per_device_batch_size (4)") == 1
    assert [checkpoint_step(folder) for folder in checkpoints(config.output_dir)] == [4]
    fault(
        "one of two processes runs out of memory",
        "its error names the option to halve; the launcher ends the other; checkpoints are intact",
    )


def test_run_of_one_process_resumes_with_two(tiny_run, tmp_path):
    config = tiny_run("--train.per_device_batch_size", "4", "--train.keep", "newest:3")
    whole = curves(train(config))
    for step in (8, 12):
        shutil.rmtree(config.output_dir / "checkpoints" / f"step_{step:06d}")
    save_config(config, tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml")

    assert done.returncode == 0, done.stderr
    assert "processes: 2 on cpu" in done.stderr and "resumed at step 4" in done.stderr
    resumed = curves(config.output_dir)
    for name, values in whole.items():
        assert resumed[name] == pytest.approx(values, rel=1e-3), name


def test_job_signalled_by_slurm_saves_and_resumes(tiny_run, tmp_path, fault):
    config = tiny_run("--train.per_device_batch_size", "4")
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SIGNAL_TO_ALL_TASKS)
    tasks = start_two_processes(
        ["--config", "config.yaml"], tmp_path, program=ROOT / "launch" / "slurm" / "task.sh"
    )
    errors = [task.communicate(timeout=300)[1] for task in tasks]

    assert [task.returncode for task in tasks] == [75, 75], errors
    assert (tmp_path / "exit_codes").read_text() == "75\n75\n"
    assert "SIGUSR1: finishing the step, then saving" in errors[0]
    assert "stopped after step 7 of 12, checkpoint saved" in errors[0]
    assert [checkpoint_step(folder) for folder in checkpoints(config.output_dir)] == [4, 7]
    resumed = curves(train(config))["train/loss"]
    whole = curves(train(tiny_run("--train.per_device_batch_size", "4", name="whole")))["train/loss"]
    assert len(resumed) == 12 and resumed == pytest.approx(whole, rel=1e-4)
    fault(
        "Slurm's SIGUSR1 before the time limit, two processes",
        "both finish the step and save one checkpoint; the requeued job resumes it",
    )


def test_process_group_is_destroyed_after_what_holds_it(tiny_run, tmp_path, fault):
    save_config(tiny_run("--train.max_steps", "5"), tmp_path / "config.yaml")
    script = ROOT / "tests" / "training" / "leave_process_group.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "config.yaml"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip

    # The destructor ran inside `destroy`, where torch releases the GIL, and joined the threads of the group.
    freed, destroyed = "logger freed, reducer freed", "destroy, 0 gloo threads left"
    assert done.stdout.splitlines() == [
        f"end: 0: {freed}, {destroyed}, end",
        f"stop: 0: {freed}, {destroyed}, TrainingInterrupted",
        f"error: 0: {freed}, UserError, {destroyed}",
    ], done.stderr
    fault(
        "a run of several processes ends, stops or fails while collectives are in flight",
        "the group is destroyed last, without the GIL, and the process ends",
    )


def test_process_that_does_not_leave_is_ended():
    code = (
        "import torch; from tinystories_slm.training.distributed import _end_process_after\n"
        "store = torch.distributed.HashStore()\n"
        "torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "with _end_process_after(0.5):\n"
        "    while True: hash('x' * 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "Timeout (0:00:00.500000)!" in done.stderr, done.stderr


def test_error_of_the_main_process_ends_every_process(tiny_run, tmp_path):
    save_config(tiny_run("--train.per_device_batch_size", "4"), tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml", "--data.source", "absent.txt")

    assert done.returncode == 1  # exit code of the launcher
    assert done.stderr.count("error: data.source ('absent.txt') does not exist") == 1
    assert done.stderr.count("Traceback") == 1  # of the launcher, about the exit code of its processes


def test_configuration_error_is_printed_once_for_all_processes(tiny_run, tmp_path):
    save_config(tiny_run(), tmp_path / "config.yaml")  # 8 sequences, in micro-batches of 8
    done = launch([*TORCHRUN, "--nproc_per_node=2"], TRAIN, tmp_path / "config.yaml")

    assert done.returncode != 0
    assert done.stderr.count("error: train.batch_size (8) must be a multiple of") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_accelerate_supports_every_key_of_a_shipped_file(path):
    plain = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path))  # rejects unknown top-level keys only
    assert loaded.num_processes == plain["num_processes"]
    supported = {action.dest for action in launch_command_parser()._actions}
    assert set(plain.get("fsdp_config", {})) <= supported

    # Accelerate reads these only from flags, and ignores them in a file.
    assert not {"rdzv_backend", "same_network"} & set(plain)
    # Options that change results belong to the configuration of the run.
    assert not {"mixed_precision", "fp16", "dynamo_config", "downcast_bf16"} & set(plain)


def test_shipped_files_match_their_names():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGURATIONS}
    assert {name: (file["distributed_type"], file["num_processes"]) for name, file in files.items()} == {
        "cpu_2": ("MULTI_GPU", 2),
        "gpu_1": ("NO", 1),
        "gpu_8_ddp": ("MULTI_GPU", 8),
        "gpu_8_fsdp2": ("FSDP", 8),
        "multi_node": ("MULTI_GPU", 16),
    }
    sharded = files["gpu_8_fsdp2"]["fsdp_config"]
    assert sharded["fsdp_version"] == 2 and sharded["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert sharded["fsdp_transformer_layer_cls_to_wrap"] == TinyStoriesDecoderLayer.__name__


def test_configured_precision_overrides_the_launcher(tiny_run, monkeypatch):
    seen = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(Accelerator, "end_training", lambda self: seen.append(self.mixed_precision))
    train(tiny_run("--train.max_steps", "3", "--train.mixed_precision", "no"))
    assert seen == ["no"]


def test_gradients_are_views_of_the_allreduce_buckets(tiny_run):
    accelerator, _ = build_accelerator(tiny_run())
    handler = accelerator.ddp_handler
    assert handler.gradient_as_bucket_view
    assert handler.bucket_cap_mb == 25 and not handler.find_unused_parameters


def test_batch_size_not_divisible_by_processes_raises(tiny_run, monkeypatch):
    config = tiny_run("--train.per_device_batch_size", "8")
    state = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    monkeypatch.setattr("tinystories_slm.training.distributed._init_processes", lambda: state)
    with pytest.raises(UserError, match=r"train.batch_size \(8\).*\(8 x 3\)"):
        start_run(config)
    assert not config.output_dir.exists()


def test_muon_in_fp16_raises(tiny_run, monkeypatch):
    monkeypatch.setattr("tinystories_slm.training.runtime.resolve_precision", lambda *_: "fp16")
    with pytest.raises(UserError, match=r"fp16.*muon.*bf16"):
        start_run(tiny_run("--train.optimizer", "muon"))

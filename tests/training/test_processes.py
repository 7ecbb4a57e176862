"""Several processes are one run: real ones, joined by gloo on the loopback."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from tinystories_slm.config import save_config
from tinystories_slm.model.modeling_tinystories import TinyStoriesDecoderLayer
from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoints, step_of
from tinystories_slm.training.processes import build_accelerator
from tinystories_slm.training.watching.tracking import read_metrics

CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CPU_2 = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")]
TORCHRUN = ["torch.distributed.run", "--standalone"]
TRAIN = ROOT / "scripts" / "train.py"

# The second process is lost at its seventh step, in the middle of the run.
LOSES_ONE = """
import os, signal
from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def lost(run):
    if run.progress.step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run)

loop.train_step = lost
doorway(loop.train, RunConfig)
"""


# The second process alone runs out of memory.
RUNS_OUT = """
import os
from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def out_of_memory(run):
    if run.progress.step == 6 and os.environ["RANK"] == "1":
        raise MemoryError("as if")
    return train_step(run)

loop.train_step = out_of_memory
doorway(loop.train, RunConfig)
"""


# The first process has its machine's script signalled at the seventh step, and takes it once it is through.
SIGNALS_ITS_SCRIPT = """
import os, signal, time
from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig
from tinystories_slm.training import loop

train_step = loop.train_step

def signalled(run):
    if run.progress.step == 6 and os.environ["RANK"] == "0":
        os.kill(int(os.environ["NODE_SH"]), signal.SIGUSR1)
        while run.stop.received is None:
            time.sleep(0.01)
    return train_step(run)

loop.train_step = signalled
doorway(loop.train, RunConfig)
"""


def launch(launcher: list[str], script: Path, config_file: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(script), "--config", str(config_file), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,  # a hang
    )


def curves(run_dir: Path) -> dict[str, list[float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {
        name: [line[name] for line in lines if name in line]
        for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss")
    }


def test_two_processes_train_what_one_does(tiny_run, tmp_path):
    # With averaged weights, each process scores its share of the stories by an average of its own.
    config = tiny_run("--train.per_device_batch_size", "4", "--train.ema_decay", "0.9", name="alone")
    alone = curves(train(config))
    save_config(config, tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml", f"--output_dir={tmp_path / 'run'}")

    assert done.returncode == 0, done.stderr
    told = re.findall(r"on: (\d) process(?:es)?, cpu.*, (\d) micro-batch", done.stderr)
    assert told == [("2", "1")]  # where one process takes two; and one voice
    assert len(alone["train/loss"]) == len(alone["train/grad_norm"]) == 12
    for name, values in curves(tmp_path / "run").items():
        assert values == pytest.approx(alone[name], rel=1e-4), name


def test_a_process_that_dies_ends_the_job_and_what_was_saved_goes_on(tiny_run, tmp_path, fault):
    flags = ("--train.per_device_batch_size", "4", "--train.optimizer", "muon")
    config = tiny_run(*flags)
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "loses_one.py"
    script.write_text(LOSES_ONE)
    done = launch(CPU_2, script, tmp_path / "config.yaml")

    assert done.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", done.stderr), done.stderr
    assert [step_of(folder) for folder in checkpoints(config.output_dir)] == [4]
    # And on, on another number of processes.
    resumed, whole = curves(train(config)), curves(train(tiny_run(*flags, name="whole")))
    assert len(resumed["train/loss"]) == 12
    for name, values in resumed.items():
        assert values == pytest.approx(whole[name], rel=1e-3), name
    fault(
        "SIGKILL to one of two processes",
        "the launcher ends the other and says so; the checkpoint is whole, and goes on in one process",
    )


def test_what_one_process_is_refused_is_told_whichever_it_is(tiny_run, tmp_path, fault):
    config = tiny_run("--train.per_device_batch_size", "4")
    save_config(config, tmp_path / "config.yaml")
    script = tmp_path / "runs_out.py"
    script.write_text(RUNS_OUT)
    done = launch(CPU_2, script, tmp_path / "config.yaml")

    assert done.returncode == 1
    assert done.stderr.count("process 1: out of memory; halve train.per_device_batch_size (4)") == 1
    assert [step_of(folder) for folder in checkpoints(config.output_dir)] == [4]
    fault(
        "one of two processes runs out of memory",
        "it says which knob to halve; the launcher ends the other; what was saved is whole",
    )


def test_a_run_of_one_process_goes_on_in_two(tiny_run, tmp_path):
    config = tiny_run("--train.per_device_batch_size", "4", "--train.keep_checkpoints", "3")
    whole = curves(train(config))
    for step in (8, 12):
        shutil.rmtree(config.output_dir / "checkpoints" / f"step_{step:06d}")
    save_config(config, tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml")

    assert done.returncode == 0, done.stderr
    assert "on: 2 processes" in done.stderr and "resumed at step 4" in done.stderr
    resumed = curves(config.output_dir)
    for name, values in whole.items():
        assert resumed[name] == pytest.approx(values, rel=1e-3), name


def test_a_job_that_slurm_signals_saves_and_goes_on(tiny_run, tmp_path, fault):
    config = tiny_run("--train.per_device_batch_size", "4")
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SIGNALS_ITS_SCRIPT)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "NUM_PROCESSES": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f'NODE_SH=$$ exec "{ROOT}/docs/slurm/node.sh" --config config.yaml'],
        env=os.environ | slurm | address | path | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 1, done.stderr  # the launcher's for the 75 of its processes
    assert "SIGTERM: finishing the step, then saving" in done.stderr
    assert "stopped after step 7 of 12, saved" in done.stderr
    assert [step_of(folder) for folder in checkpoints(config.output_dir)] == [4, 7]
    resumed = curves(train(config))["train/loss"]
    whole = curves(train(tiny_run("--train.per_device_batch_size", "4", name="whole")))["train/loss"]
    assert len(resumed) == 12 and resumed == pytest.approx(whole, rel=1e-4)
    fault(
        "Slurm's SIGUSR1 before the time limit, two processes",
        "both finish the step, one checkpoint; the requeued job goes on from it",
    )


def test_what_the_first_process_is_refused_ends_every_process(tiny_run, tmp_path):
    save_config(tiny_run("--train.per_device_batch_size", "4"), tmp_path / "config.yaml")
    done = launch(CPU_2, TRAIN, tmp_path / "config.yaml", "--data.max_stories", "7")

    assert done.returncode == 1  # the launcher's own
    assert done.stderr.count("error: data.data_dir") == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own, about its children's exit code


def test_what_is_refused_is_told_once_and_ends_every_process(tiny_run, tmp_path):
    save_config(tiny_run(), tmp_path / "config.yaml")
    done = launch([*TORCHRUN, "--nproc_per_node=3"], TRAIN, tmp_path / "config.yaml")

    assert done.returncode != 0
    assert done.stderr.count("error: train.batch_size (8) must be a multiple of") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_accelerate_knows_every_key_of_a_shipped_file(path):
    plain = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path))  # refuses unknown keys of the first level, and those alone
    assert loaded.num_processes == plain["num_processes"]
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(plain.get("fsdp_config", {})) <= known

    # These are read from flags alone: in a file Accelerate passes over them without a word.
    assert not {"rdzv_backend", "same_network"} & set(plain)
    # What changes numbers is the run's own configuration's.
    assert not {"mixed_precision", "fp16", "dynamo_config", "downcast_bf16"} & set(plain)


def test_the_files_say_what_their_names_say():
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


def test_the_runs_own_number_type_beats_the_launchers(tiny_run, monkeypatch):
    seen = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(Accelerator, "end_training", lambda self: seen.append(self.mixed_precision))
    train(tiny_run("--train.max_steps", "3", "--train.mixed_precision", "no"))
    assert seen == ["no"]


def test_gradients_are_exchanged_where_they_lie(tiny_run):
    accelerator, _ = build_accelerator(tiny_run())
    handler = accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and not handler.broadcast_buffers
    assert handler.bucket_cap_mb == 25 and not handler.find_unused_parameters

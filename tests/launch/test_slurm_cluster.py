"""The job scripts of launch/slurm on a real Slurm with two nodes without GPUs."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from launch.slurm_cluster import Cluster, missing_requirement, slurm_cluster, wait_until

pytestmark = pytest.mark.slow
CONFIG = ("--config", "configs/debug.yaml", "--train.warmup_steps=2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("cluster") / "slurm") as running:
        yield running


@pytest.fixture
def project(tmp_path) -> Path:
    """A fresh clone of this project with its environment."""
    folder = tmp_path / "project"
    for name in ("scripts", "configs", "launch", "tinystories_slm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = folder / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "python").chmod(0o755)
    (environment / "activate").write_text(f"export PATH={environment}:$PATH PYTHONPATH={folder}\n")
    return folder


class Job:
    """A submitted training job of two processes, one on each node."""

    def __init__(self, cluster: Cluster, project: Path, *options: str) -> None:
        self.cluster, self.project = cluster, project
        script = project / "launch" / "slurm" / "train_cpu.sbatch"
        # From another folder than the project.
        self.number = cluster.submit("--cpus-per-task=1", script, *CONFIG, *options, cwd=project.parent)

    @property
    def output(self) -> str:
        path = self.project.parent / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def wait(self) -> dict[str, str]:
        return self.cluster.wait(self.number)

    def wait_for(self, text: str, *, times: int = 1) -> None:
        wait_until(lambda: self.output.count(text) >= times, 240)

    def workers(self) -> dict[int, int]:
        """Return the process numbers of the training processes by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if f"SLURM_JOB_ID={self.number}".encode() in environment and b"scripts/train.py" in command:
                rank = next((value for value in environment if value.startswith(b"RANK=")), None)
                if rank and b"srun" not in command:
                    found[int(rank.removeprefix(b"RANK="))] = int(process.name)
        return found


def test_a_fresh_clone_trains_on_two_nodes(cluster, project):
    job = Job(cluster, project, "--train.max_steps=6")
    assert job.wait()["JobState"] == "COMPLETED", job.output
    assert "processes: 2 on cpu:0" in job.output
    assert job.output.endswith(f"job {job.number}: run complete in runs/debug\n")
    assert (project / "runs" / "debug" / "best" / "model.safetensors").is_file()
    assert not list((project / "runs" / "debug").glob(".job_*"))


def test_a_job_at_its_limit_saves_and_ends_with_the_bits_of_one_job(cluster, project):
    options = ("--train.max_steps=300", "--train.eval_every=300", "--train.save_every=300")
    whole = Job(cluster, project, *options, "--output_dir=runs/whole")
    assert whole.wait()["JobState"] == "COMPLETED", whole.output
    job = Job(cluster, project, *options)
    job.wait_for("run time at least")
    # As `#SBATCH --signal=B:USR1@120` sends it: to the batch script alone.
    cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
    job.wait_for("before the time limit; requeued")
    assert job.wait()["JobState"] == "COMPLETED", job.output
    assert job.output.endswith(f"job {job.number}: run complete in runs/debug\n")
    assert "resum" in job.output and "Traceback" not in job.output
    weights = [
        (project / "runs" / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "debug")
    ]
    assert weights[0] == weights[1]


def test_a_killed_process_restarts_the_job(cluster, project):
    job = Job(cluster, project, "--train.max_steps=400", "--train.save_every=20", "--train.eval_every=400")
    checkpoints = project / "runs" / "debug" / "checkpoints"
    wait_until(lambda: checkpoints.is_dir() and any(checkpoints.glob("step_*")), 240)
    os.kill(job.workers()[1], signal.SIGKILL)
    job.wait_for("; requeued")
    assert job.wait()["JobState"] == "COMPLETED", job.output
    assert "a process failed" in job.output and "Traceback" not in job.output
    assert not (project / "runs" / "debug" / "failed_step").exists()


def test_a_job_that_fails_twice_at_the_same_step_ends(cluster, project):
    job = Job(
        cluster, project, "--train.max_steps=20000", "--train.save_every=20000", "--train.eval_every=20000"
    )
    for number in (1, 2):
        job.wait_for("run time at least", times=number)
        os.kill(job.workers()[1], signal.SIGKILL)
    assert job.wait()["JobState"] == "FAILED"
    assert job.output.count("; requeued") == 1
    assert job.output.splitlines()[-1].startswith(f"job {job.number}: failed again after step 0")


def test_a_lost_node_restarts_the_job(cluster, project):
    job = Job(cluster, project, "--train.max_steps=400", "--train.save_every=20", "--train.eval_every=400")
    checkpoints = project / "runs" / "debug" / "checkpoints"
    wait_until(lambda: checkpoints.is_dir() and any(checkpoints.glob("step_*")), 240)
    cluster.kill_node("n2")
    wait_until(lambda: cluster.show(job.number)["JobState"] != "RUNNING", 120)
    cluster.start_node("n2")
    assert job.wait()["JobState"] == "COMPLETED", job.output


def test_a_rejected_configuration_ends_the_job_at_once(cluster, project):
    job = Job(cluster, project, "--train.max_stepz=6")
    state = job.wait()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert job.output.splitlines() == [
        "error: unknown option 'train.max_stepz'; did you mean train.max_steps?",
        f"job {job.number}: configuration rejected; correct it, then submit again",
    ]


def test_a_value_that_only_the_run_rejects_ends_the_job(cluster, project):
    job = Job(cluster, project, "--train.batch_size=7")
    state = job.wait()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert "Traceback" not in job.output and job.output.startswith("error: train.batch_size (7)")


def test_a_second_job_on_the_same_run_ends_and_the_first_goes_on(cluster, project):
    options = ("--train.max_steps=20000", "--train.eval_every=20000", "--train.save_every=20000")
    first = Job(cluster, project, *options)
    first.wait_for("run time at least")
    second = Job(cluster, project, *options)
    state = second.wait()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), second.output
    assert cluster.show(first.number)["JobState"] == "RUNNING", first.output
    cluster.run("scancel", str(first.number))
    assert first.wait()["JobState"] == "CANCELLED"


def test_scancel_ends_every_process_after_saving(cluster, project):
    job = Job(
        cluster, project, "--train.max_steps=20000", "--train.save_every=20000", "--train.eval_every=20000"
    )
    job.wait_for("run time at least")
    workers = job.workers()
    cluster.run("scancel", str(job.number))
    assert job.wait()["JobState"] == "CANCELLED"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers.values()), 30)
    assert list((project / "runs" / "debug" / "checkpoints").glob("step_*")), job.output


def test_a_project_without_environment_ends_with_its_command(cluster, project):
    shutil.rmtree(project / ".venv")
    job = Job(cluster, project)
    assert job.wait()["ExitCode"] == "2:0"
    assert "has no environment; run python3 install.py there" in job.output


def test_scripts_are_valid_bash():
    for script in sorted((ROOT / "launch" / "slurm").iterdir()):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script.name

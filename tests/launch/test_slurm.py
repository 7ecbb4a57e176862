"""The job scripts of launch/slurm, with substitutes for Slurm's commands."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "launch" / "slurm"
COMMANDS = {
    # srun forwards signals to its task, as the real one does.
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        "$@" & task=$!
        trap 'pkill -USR1 -P $task' USR1
        wait $task; code=$?
        while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
        exit $code""",
    # Runs the job, or each task of an array job, at once.
    "sbatch": """
        echo "sbatch $*" >> "$LOG"
        last=
        while [ "${1#--}" != "$1" ]; do
            case "$1" in --array=0-*) last=${1#--array=0-} ;; esac
            shift
        done
        if [ -z "$last" ]; then bash "$@" >&2 || exit 1
        else for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$@" >&2 || exit 1; done; fi
        echo "$(wc -l < "$LOG");cluster" """,
    # It prints a list of three runs, or waits for a signal; on USR1 it saves and exits with 75.
    "python": """
        case "$*" in
        *--print_config*) printf "output_dir: runs/9m\ndata:\n  data_dir: data/9m\n"; exit "$CONFIG_CODE" ;;
        *socket*) echo 29500; exit ;;
        *importlib*) echo 0.1.0 2.13.0 5.24.0; exit ;;
        esac
        printf "[%s]" "$@" >> "$LOG"; echo >> "$LOG"
        case "$*" in *--list) echo "a run"; echo "3 to run, at most 1 at a time" ;; esac
        [ "$1" = scripts/train.py ] && echo "$MASTER_ADDR:$MASTER_PORT $RANK of $WORLD_SIZE" >> "$LOG"
        [ "$EXIT_CODE" = signaled ] || exit "$EXIT_CODE"
        trap 'echo saved >> "$LOG"; exit 75' USR1
        echo started > "$READY"
        while :; do read -r -t 1 < /dev/zero || true; done""",
    "scontrol": """
        case "$1 $2" in
        "show hostnames") echo node17 ;;
        "show job") echo "   Command=$SCRIPT --train.seed 3" ;;
        *) echo "$@" >> "$LOG" ;;
        esac""",
}


@pytest.fixture
def job(tmp_path):
    """Return a function that starts train.sbatch; the launcher exits with the code, or waits for a signal."""
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    os.mkfifo(tmp_path / "ready")

    def start(
        exit_code: str, script: str = "train.sbatch", *options: str, **variables: str
    ) -> subprocess.Popen:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "READY": str(tmp_path / "ready"),
            "EXIT_CODE": exit_code,
            "CONFIG_CODE": "0",
            "SCRIPT": str(tmp_path / "launch" / "slurm" / script),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[17-18]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "16",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": "node17",
            "SLURM_GPUS_ON_NODE": "8",
        }
        command = ["bash", str(tmp_path / "launch" / "slurm" / script), *(options or ("--train.seed", "3"))]
        return subprocess.Popen(command, env=environment | variables, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (0, "run complete in runs/9m"),
        (2, "the run cannot continue, for the reason above; correct it, then submit again"),
        (75, "stopped and saved at step 0; submit again to resume"),
    ],
)
def test_finished_job_keeps_its_exit_code_and_is_not_requeued(job, tmp_path, code, message):
    running = job(str(code))
    assert running.communicate(timeout=30)[0] == f"job 4711: {message}\n"
    assert running.returncode == code
    log = (tmp_path / "log").read_text()
    assert log == "[scripts/train.py][--train.seed][3]\nnode17:29500 0 of 16\n"


def test_failed_job_is_requeued_until_it_fails_at_the_same_step(job, tmp_path):
    checkpoints = tmp_path / "runs" / "9m" / "checkpoints"
    for step, is_requeued in ((None, True), (200, True), (400, True), (400, False)):
        if step:
            (checkpoints / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
            (checkpoints / f"step_{step + 1:06d}.partial").mkdir(exist_ok=True)
        running = job("1")
        output = running.communicate(timeout=30)[0]
        assert ("requeued" in output) == is_requeued, output
        assert (
            f"after the checkpoint of step {step or 0}" in output
            or f"failed again after step {step}" in output
        )
        assert running.returncode == (0 if is_requeued else 1)
    assert (tmp_path / "log").read_text().count("requeue 4711") == 3


def test_rejected_configuration_starts_nothing(job, tmp_path):
    running = job("0", CONFIG_CODE="2")
    message = "job 4711: configuration rejected; correct it, then submit again\n"
    assert (running.communicate(timeout=30)[0], running.returncode) == (message, 2)
    assert not (tmp_path / "log").exists()


def test_job_signalled_before_its_limit_saves_and_is_requeued(job, tmp_path):
    running = job("signaled")
    (tmp_path / "ready").read_text()  # waits for the start of the training process
    running.send_signal(signal.SIGUSR1)  # to the batch script alone, as `--signal=B:` does
    assert running.wait(timeout=30) == 0

    assert (tmp_path / "log").read_text().splitlines()[-2:] == ["saved", "requeue 4711"]


def test_preparation_submits_tokenizer_shards_and_merge(job, tmp_path):
    source = "[{name: tinystories, weight: 3}]"
    running = job("0", "prepare.sh", "--data.source", source, SHARDS="3")
    assert (
        running.communicate(timeout=30)[0] == "submitted: tokenizer 2, 3 shards 6, merge 8; logs in runs/\n"
    )
    assert running.returncode == 0 and (tmp_path / "runs").is_dir()
    options, script = f"[--data.source][{source}]", "launch/slurm/prepare.sbatch"
    flag = f"--data.source {source}"
    submit = "sbatch --parsable --kill-on-invalid-dep=yes --output=runs/slurm-"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{submit}%j.out {script} scripts/train_tokenizer.py {flag}",
        f"[scripts/train_tokenizer.py]{options}",
        f"{submit}%A_%a.out --array=0-2 --dependency=afterok:2 {script} scripts/prepare_data.py {flag}",
        *(f"[scripts/prepare_data.py]{options}[--shard][{rank}/3]" for rank in range(3)),
        f"{submit}%j.out --dependency=afterok:6 {script} scripts/prepare_data.py {flag} --merge_shards 3",
        f"[scripts/prepare_data.py]{options}[--merge_shards][3]",
    ]


def test_preparation_that_cannot_be_submitted_stops(job, tmp_path):
    running = job("2", "prepare.sh", "--config", "none.yaml")
    assert "submitted" not in running.communicate(timeout=30)[0] and running.returncode != 0
    assert (tmp_path / "log").read_text().count("sbatch") == 2  # the first job, and the name of its script


def test_sweep_submits_data_runs_and_table(job, tmp_path):
    flags = ("--config", "a.yaml", "--only", "4 layers")
    running = job("0", "sweep.sh", *flags)
    assert running.communicate(timeout=30)[0] == "submitted: data 3, 3 runs 7, table 9; logs in runs/\n"
    assert running.returncode == 0 and (tmp_path / "runs").is_dir()
    options, flag = "[scripts/sweep.py]" + "".join(f"[{flag}]" for flag in flags), " ".join(flags)
    submit, script = (
        "sbatch --parsable --kill-on-invalid-dep=yes --output=runs/slurm-",
        "launch/slurm/sweep.sbatch",
    )
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{options}[--list]",
        f"{submit}%j.out {script} {flag} --prepare",
        f"{options}[--prepare]",
        f"{submit}%A_%a.out --array=0-2 --dependency=afterok:3 {script} {flag}",
        *(f"{options}[--index][{index}]" for index in range(3)),
        f"{submit}%j.out --dependency=afterany:7 {script} {flag} --table",
        f"{options}[--table]",
    ]


def test_sweep_that_is_invalid_submits_nothing(job, tmp_path):
    running = job("2", "sweep.sh", "--config", "none.yaml")
    assert "submitted" not in running.communicate(timeout=30)[0] and running.returncode != 0
    assert "sbatch" not in (tmp_path / "log").read_text()


def test_task_of_a_sweep_is_requeued_before_its_limit(job, tmp_path):
    running = job("signaled", "sweep.sbatch", "--config", "a.yaml", SLURM_ARRAY_TASK_ID="2")
    (tmp_path / "ready").read_text()
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=30) == 0
    log = (tmp_path / "log").read_text().splitlines()
    assert log == ["[scripts/sweep.py][--config][a.yaml][--index][2]", "saved", "requeue 4711"]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_task_of_a_sweep_keeps_its_exit_code(job, tmp_path, code):
    assert job(str(code), "sweep.sbatch", SLURM_ARRAY_TASK_ID="0").wait(timeout=30) == code
    assert "requeue" not in (tmp_path / "log").read_text()

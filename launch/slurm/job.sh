#!/usr/bin/env bash
# A training job: check the nodes, train, then end the job with one line, or requeue it.
# train.sbatch and train_cpu.sbatch start this script on the first node.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

end() { # exit code, message
    echo "job $SLURM_JOB_ID: $2"
    exit "$1"
}
requeue() { # message
    echo "job $SLURM_JOB_ID: $1; requeued"
    exec scontrol requeue "$SLURM_JOB_ID"
}
newest_step() {
    find "$output_dir/checkpoints" -maxdepth 1 -name 'step_*[0-9]' 2>/dev/null | sed 's/.*step_0*//; s/^$/0/' |
        sort -n | tail -n 1
}

[ -f .venv/bin/activate ] || end 2 "$PWD has no environment; run python3 install.py there, then submit again"
source .venv/bin/activate
config=$(python scripts/train.py "$@" --print_config) || end 2 "configuration rejected; correct it, then submit again"
output_dir=$(sed -n 's/^output_dir: //p' <<<"$config")
data_dir=$(sed -n 's/^ *data_dir: //p' <<<"$config")
mark=.job_$SLURM_JOB_ID # a node that shares the folder sees this file
export EXIT_CODES=$output_dir/$mark
{ mkdir -p "$output_dir" "$data_dir" && touch "$output_dir/$mark" "$data_dir/$mark"; } || end 2 "output_dir or data.data_dir cannot be created"

# The rank of each task is set in task.sh. Rank 0 is on this node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
WORLD_SIZE=$SLURM_NTASKS
LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take the job's
export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS SRUN_CPUS_PER_TASK
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    export ACCELERATE_USE_CPU=1
fi

srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 launch/slurm/check_node.sh \
    "$(launch/slurm/check_node.sh --versions)" "$(date +%s)" "$output_dir/$mark" "$data_dir/$mark" ||
    end 2 "a node is not usable; correct what the line above names, then submit again"
rm -f "$data_dir/$mark"

stopping=no
srun --kill-on-bad-exit=1 launch/slurm/task.sh "$@" &
step=$!
trap 'stopping=yes; kill -USR1 "$step"' USR1 # srun forwards it to every process
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal interrupted the first wait
    wait "$step"
    code=$?
done
trap - USR1
# The first process that fails has the lowest code: Slurm then ends the others.
first=$(sort -n "$EXIT_CODES" | grep -v '^0$' | head -n 1)
code=${first:-$code}
rm -f "$EXIT_CODES"

# A job is started again as long as the run advances: a failure at the step of the last failure ends it.
failed=$output_dir/failed_step
at=$(newest_step)
at=${at:-0}
case $code in
0) rm -f "$failed" && end 0 "run complete in $output_dir" ;;
2) end 2 "the run cannot continue, for the reason above; correct it, then submit again" ;;
esac
if [ "$stopping" = yes ]; then
    requeue "saved step $at before the time limit"
elif [ "$code" = 75 ]; then
    end 75 "stopped and saved at step $at; submit again to resume"
elif [ "$at" -gt "$(cat "$failed" 2>/dev/null || echo -1)" ]; then
    echo "$at" >"$failed"
    requeue "a process failed (exit code $code) after the checkpoint of step $at"
fi
end "$code" "failed again after step $at; correct the cause above, then submit again"

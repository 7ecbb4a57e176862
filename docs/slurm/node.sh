#!/usr/bin/env bash
# What train.sbatch starts once on each machine: the launcher, which starts a process for each GPU.
set -uo pipefail

# The launcher knows no USR1 and would die of it. It does know TERM: it hands that on to its processes and
# gives them 30 seconds. Whether Slurm signals this script alone or all that it started, both ways work.
(
    trap '' USR1
    exec accelerate launch --config_file configs/accelerate/multi_node.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
        scripts/train.py "$@"
) &
launcher=$!
trap 'kill -TERM "$launcher"' USR1
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # the first wait ended because of the signal
    wait "$launcher"
    code=$?
done
exit "$code"

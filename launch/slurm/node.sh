#!/usr/bin/env bash
# Run the launcher on one machine; it starts a process for each GPU. train.sbatch starts this script.
set -uo pipefail

# USR1 would terminate the launcher. On TERM it forwards the signal to its processes and waits 30 seconds.
# This works if Slurm signals only this script, and if it signals all processes.
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
while kill -0 "$launcher" 2>/dev/null; do # the signal interrupted the first wait
    wait "$launcher"
    code=$?
done
exit "$code"

#!/usr/bin/env bash
# One process of a training job; job.sh starts this script once for each process of the launch.
# Slurm returns the highest exit code of all processes, and those that it ends have high ones. So each code is recorded.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
trap : USR1 TERM # Slurm sends a signal to this script and to Python; Python acts on it
python scripts/train.py "$@"
code=$?
echo "$code" >>"$EXIT_CODES"
exit "$code"

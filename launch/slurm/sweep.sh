#!/usr/bin/env bash
# Do a sweep on several machines under Slurm; run this on the login node:
#   launch/slurm/sweep.sh --config configs/sweeps/width_depth.yaml
# It submits three jobs: the data, the runs (an array job) and, when these have ended, the table. After a failure,
# run it again: finished runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .venv/bin/activate
mkdir -p runs # Slurm does not create the folder of --output, and a job without it fails silently
listed=$(python scripts/sweep.py "$@" --list)
count=$(tail -n 1 <<< "$listed" | cut -d ' ' -f 1) # "9 to run, at most 1 at a time"

submit() { # options of sbatch up to `--`, then options of the sweep
    local options=()
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" launch/slurm/sweep.sbatch "$@"
}
data=$(submit --output=runs/slurm-%j.out -- "$@" --prepare)
runs=$(submit --output=runs/slurm-%A_%a.out --array="0-$((count - 1))" --dependency="afterok:${data%%;*}" -- "$@")
table=$(submit --output=runs/slurm-%j.out --dependency="afterany:${runs%%;*}" -- "$@" --table)
echo "submitted: data ${data%%;*}, $count runs ${runs%%;*}, table ${table%%;*}; logs in runs/"

#!/usr/bin/env bash
# Prepare the token files on several machines under Slurm; run this on the login node:
#   SHARDS=32 launch/slurm/prepare.sh --config configs/51m.yaml
# It submits three jobs, each of which waits for the one before: stories and tokenizer, the shards (an array job),
# and their merge. After a failure, run it again: finished steps and shards are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export SHARDS=${SHARDS:-16}
mkdir -p runs # Slurm does not create the folder of --output, and a job without it fails silently

submit() { # options of sbatch up to `--`, then the command
    local options=()
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" launch/slurm/prepare.sbatch "$@"
}
tokenizer=$(submit --output=runs/slurm-%j.out -- scripts/train_tokenizer.py "$@")
shards=$(submit --output=runs/slurm-%A_%a.out --array="0-$((SHARDS - 1))" \
    --dependency="afterok:${tokenizer%%;*}" -- scripts/prepare_data.py "$@")
merge=$(submit --output=runs/slurm-%j.out --dependency="afterok:${shards%%;*}" \
    -- scripts/prepare_data.py "$@" --merge_shards "$SHARDS")
echo "submitted: tokenizer ${tokenizer%%;*}, $SHARDS shards ${shards%%;*}, merge ${merge%%;*}; logs in runs/"

#!/usr/bin/env bash
# Check one node of a job:
#   check_node.sh --versions                     print the versions that must be equal on all nodes
#   check_node.sh VERSIONS SECONDS FILE...       check them, the clock, and that the node sees the files
set -uo pipefail
versions() { python -c 'from importlib.metadata import version as v; print(*map(v, ("tinystories_slm", "torch", "transformers")))'; }
fail() {
    echo "node $SLURMD_NODENAME: $1" >&2
    exit 2
}
if [ "$1" = --versions ]; then versions && exit; fi
expected=$1 seconds=$2
shift 2
here=$(versions) || fail "tinystories_slm is not installed in $(command -v python); share the project folder"
[ "$here" = "$expected" ] || fail "versions ($here) must be those of the first node ($expected)"
skew=$(($(date +%s) - seconds))
[ "${skew#-}" -lt 60 ] || echo "node $SLURMD_NODENAME: its clock differs by $skew s from the first node's" >&2
for file; do
    [ -e "$file" ] || fail "$(dirname "$file") must be on a file system that all nodes share"
done

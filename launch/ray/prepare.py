"""Prepare the token files with Ray, on this machine or on a cluster: pip install ray, then

    python launch/ray/prepare.py --num_shards 4 --config configs/9m.yaml

All other options are those of scripts/prepare_data.py. On a cluster, all machines must share the folders of
`data.data_dir` and of this checkout. After a failure, run it again: finished shards are kept.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ray

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run_script(folder: Path, script: str, *options: str) -> None:
    """Run a command of the project in `folder`, to which relative paths in `options` refer."""
    subprocess.run([sys.executable, str(SCRIPTS / f"{script}.py"), *options], cwd=folder, check=True)


def main() -> None:
    """Train the tokenizer, write the shards in parallel, and merge them."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="All other options are those of scripts/prepare_data.py."
    )
    parser.add_argument("--num_shards", type=int, default=4, help="number of shards")
    parser.add_argument("--num_cpus", type=int, help="number of workers; default: all cores of the cluster")
    args, options = parser.parse_known_args()
    if args.num_shards < 1:
        parser.error(f"num_shards ({args.num_shards}): must be at least 1; use the number of workers")
    folder = Path.cwd()
    ray.init(num_cpus=args.num_cpus)
    run_script(folder, "train_tokenizer", *options)
    write_shard = ray.remote(num_cpus=1, max_retries=2)(run_script)
    ray.get(
        [
            write_shard.remote(folder, "prepare_data", *options, "--shard", f"{rank}/{args.num_shards}")
            for rank in range(args.num_shards)
        ]
    )
    run_script(folder, "prepare_data", *options, "--merge_shards", str(args.num_shards))


if __name__ == "__main__":
    main()

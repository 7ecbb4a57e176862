"""Train the same run twice, once undisturbed and once killed at random moments, and compare the results.

    python benchmarks/interrupted.py --kills 20

Writes docs/interrupted.png and benchmarks/results/interrupted.json: the steps at which it was killed, and the
SHA-256 of the weights of both runs.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

from harness import ROOT, command, line_chart, write_result

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training import train

FLAGS = (
    *("--config", str(ROOT / "configs" / "debug.yaml"), "--model.dropout", "0.1"),
    *("--train.max_steps", "300", "--train.log_every", "5", "--train.eval_every", "50"),
    *("--train.save_every", "10", "--train.warmup_steps", "20"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kill times")
    parser.add_argument("--folder", type=Path, default=Path("runs/interrupted"))
    args = parser.parse_args()

    shutil.rmtree(args.folder, ignore_errors=True)
    whole = train(_config(args.folder / "whole"))
    killed_at = _train_killed(_config(args.folder / "killed"), args.kills, random.Random(args.seed))
    runs = {"whole": whole, "killed": args.folder / "killed"}
    sums = {name: _sha256(run_dir / "last" / "model.safetensors") for name, run_dir in runs.items()}
    curves = {name: _curve(run_dir) for name, run_dir in runs.items()}
    result = {
        "command": command(),
        "flags": [flag.replace(f"{ROOT}/", "") for flag in FLAGS],
        "killed_at_step": killed_at,
        "sha256_of_last": sums,
        "curves_equal": curves["whole"] == curves["killed"],
    }
    write_result("interrupted", result)
    draw(curves, killed_at, ROOT / "docs" / "interrupted.png")
    print(json.dumps(result, indent=1))


def _config(output_dir: Path) -> RunConfig:
    return parse_config([*FLAGS, "--output_dir", str(output_dir)])


def _train_killed(config: RunConfig, kills: int, rng: random.Random) -> list[int]:
    """Train the run, kill it `kills` times, and return the last logged step before each kill."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tinystories_slm.training"])
    metrics, killed_at = config.output_dir / "metrics.jsonl", []
    for kill in range(kills):
        process = processes.Process(target=train, args=(config,))
        process.start()
        # Kills are spread over the run, so that each process advances.
        goal = (kill + 1) * config.train.max_steps // (kills + 1)
        while process.is_alive() and _last_step(metrics) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        killed_at.append(_last_step(metrics))
    process = processes.Process(target=train, args=(config,))
    process.start()
    process.join()
    return killed_at


def _last_step(metrics: Path) -> int:
    return max((line["step"] for line in read_metrics(metrics)), default=0)


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    return [
        (m["step"], m["train/loss"]) for m in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in m
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(curves: dict[str, list[tuple[int, float]]], killed_at: list[int], path: Path) -> None:
    """Chart both training curves, with a vertical line at each kill."""
    with line_chart(path, xlabel="optimizer step", ylabel="training loss (nats per token)") as axes:
        for step in killed_at:
            axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.5)
        axes.plot([], [], color="tab:red", linewidth=0.8, label=f"SIGKILL ({len(killed_at)} times)")
        axes.plot(*zip(*curves["whole"], strict=True), linewidth=5, alpha=0.35, label="undisturbed")
        label = "killed and resumed"
        axes.plot(*zip(*curves["killed"], strict=True), linewidth=1.2, color="black", label=label)


if __name__ == "__main__":
    main()

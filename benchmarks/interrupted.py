"""Train the same run twice, once undisturbed and once killed at random moments, and lay the curves together.

    python benchmarks/interrupted.py --kills 20

Writes docs/interrupted.png and benchmarks/results/interrupted.json: where it was killed, and the SHA-256 of
the weights that each of the two ended with.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.training import train
from tinystories_slm.training.watching.tracking import read_metrics

ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--config", str(ROOT / "configs" / "debug.yaml"), "--model.dropout", "0.1"),
    *("--train.max_steps", "300", "--train.log_every", "5", "--train.eval_every", "50"),
    *("--train.save_every", "10", "--train.warmup_steps", "20"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--folder", type=Path, default=Path("runs/interrupted"))
    args = parser.parse_args()

    shutil.rmtree(args.folder, ignore_errors=True)
    whole = train(_config(args.folder / "whole"))
    killed_at = _train_killed(_config(args.folder / "killed"), args.kills, random.Random(args.seed))
    runs = {"whole": whole, "killed": args.folder / "killed"}
    sums = {name: _sha256(run_dir / "last" / "model.safetensors") for name, run_dir in runs.items()}
    curves = {name: _curve(run_dir) for name, run_dir in runs.items()}
    result = {
        "command": "python " + " ".join(sys.argv),
        "flags": [flag.replace(f"{ROOT}/", "") for flag in FLAGS],
        "killed_at_step": killed_at,
        "sha256_of_last": sums,
        "curves_equal": curves["whole"] == curves["killed"],
    }
    path = ROOT / "benchmarks" / "results" / "interrupted.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _plot(curves, killed_at, ROOT / "docs" / "interrupted.png")
    print(json.dumps(result, indent=1))


def _config(output_dir: Path) -> RunConfig:
    return parse_config([*FLAGS, "--output_dir", str(output_dir)])


def _train_killed(config: RunConfig, kills: int, rng: random.Random) -> list[int]:
    """The run in as many lives; the last logged step of each that was killed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tinystories_slm.training"])
    metrics, killed_at = config.output_dir / "metrics.jsonl", []
    for kill in range(kills):
        process = processes.Process(target=train, args=(config,))
        process.start()
        # Lives are spread over the run, each long enough to get somewhere.
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


def _plot(curves: dict[str, list[tuple[int, float]]], killed_at: list[int], path: Path) -> None:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for step in killed_at:
        axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.5)
    axes.plot([], [], color="tab:red", linewidth=0.8, label=f"SIGKILL ({len(killed_at)} times)")
    axes.plot(*zip(*curves["whole"], strict=True), linewidth=5, alpha=0.35, label="undisturbed")
    axes.plot(*zip(*curves["killed"], strict=True), linewidth=1.2, color="black", label="killed and resumed")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

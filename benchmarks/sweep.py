"""Compare training recipes at equal wall-clock time or equal steps, one core a run, several seeds.

    python benchmarks/sweep.py --data PATH --minutes 3
    python benchmarks/sweep.py --data PATH --steps 400 --name packing --variants benchmarks/packing.yaml \
        --cores 0 1 0 1 0 1

benchmarks/sweep.yaml lists the variants. A core that `--cores` repeats has several runs at a time: with
`--steps` their speed does not matter. A run is scripts/train.py in a separate process on one core with one
thread. A variant always trains at the same time as a run of the base with the same seed, so that both see the
same load; the result is their difference. Data are prepared before and cost no time. Each run's last/ is
scored on the same held-out stories by scripts/evaluate.py. benchmarks/results/NAME.json is written after
every pair; run the same command again to train only the missing pairs. The table is written between the
markers of NAME in docs/recipe.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from harness import (
    ONLY_TRAINING,
    RESULTS,
    ROOT,
    fill_table,
    format_value,
    markdown_table,
    provenance,
    read_result,
    to_flags,
    write_result,
)

from tinystories_slm.config import parse_config
from tinystories_slm.runs.records import read_metrics

PAGE = ROOT / "docs" / "recipe.md"
LIMITS = {
    **ONLY_TRAINING,
    "train.eval_stories": 16,
    "train.log_every": 20,
    "train.resume": "never",
}

Flags = Mapping[str, object]


def main() -> None:
    args = _parse_arguments()
    spec = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    base = {"config": spec["base"]["config"], **(spec["base"].get("flags") or {})}
    variants = {name: flags or {} for name, flags in spec["variants"].items()}
    if unknown := set(args.only or ()) - set(variants):
        sys.exit(f"error: --only ({', '.join(sorted(unknown))}): no such variant in {args.variants}")
    chosen = args.only or list(variants)
    result = _load_result(args, base)
    for seed in args.seeds:  # all variants with one seed first, for an early impression of each
        missing = [name for name in chosen if not _is_done(result, name, seed, variants[name])]
        group_size = len(args.cores) - 1
        for start in range(0, len(missing), group_size):
            names = missing[start : start + group_size]
            _run_pairs(args, result, base, {name: variants[name] for name in names}, seed)
            _save_result(args, result)
    _save_result(args, result)
    print(format_table(result["pairs"]))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="source of stories, as data.source")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of a run, as train.max_minutes")
    length.add_argument("--steps", type=int, help="length of a run, as train.max_steps")
    parser.add_argument("--name", default="recipe", help="name of the result file and of the table")
    parser.add_argument("--variants", type=Path, default=ROOT / "benchmarks" / "sweep.yaml")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="train only these; other results are kept"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--stories", type=int, default=500, help="number of scored held-out stories")
    args = parser.parse_args()
    if len(args.cores) < 2:
        parser.error(
            f"--cores ({len(args.cores)}): must be at least two; variant and base train at the same time"
        )
    return args


def _run_pairs(
    args: argparse.Namespace, result: dict, base: Flags, variants: Mapping[str, Flags], seed: int
) -> None:
    """Train and score the base and all variants at the same time; append a pair for each variant."""
    folder = ROOT / "runs" / args.name
    configurations = {"base": base, **{name: {**base, **flags} for name, flags in variants.items()}}
    commands = {
        name: _train_command(args, flags, folder / f"{name}_{seed}", seed)
        for name, flags in configurations.items()
    }
    for name, argv in commands.items():
        _prepare_data(argv)
        shutil.rmtree(folder / f"{name}_{seed}", ignore_errors=True)
    # Cores rotate, in case they are not equally fast.
    offset = len(result["pairs"]) % len(args.cores)
    cores = dict(zip(commands, args.cores[offset:] + args.cores[:offset], strict=False))
    trained = _run_parallel(commands, cores, folder, f"train_{seed}")
    scores = {
        name: [
            "scripts/evaluate.py",
            f"--model={folder / f'{name}_{seed}' / 'last'}",
            f"--data={args.data}",
            f"--max_stories={args.stories}",
            f"--output={folder / f'{name}_{seed}' / 'evaluation.json'}",
        ]
        for name in commands
        if trained[name]["failed"] is None
    }
    scored = _run_parallel(scores, cores, folder, f"score_{seed}")
    metrics = {}
    for name in commands:
        run_dir = folder / f"{name}_{seed}"
        failed = trained[name]["failed"] or scored[name]["failed"]
        metrics[name] = {"failed": failed} if failed else _collect_metrics(run_dir, trained[name]["seconds"])
        shutil.rmtree(run_dir, ignore_errors=True)  # a hundred megabytes each
    for name, flags in variants.items():
        pair = {"variant": name, "flags": flags, "seed": seed, "base": metrics["base"], "run": metrics[name]}
        result["pairs"].append(pair)
        outcome = f"{_format_metrics(metrics[name])}; base {_format_metrics(metrics['base'])}"
        print(f"{name}, seed {seed}: {outcome}", flush=True)


def _train_command(args: argparse.Namespace, flags: Flags, run_dir: Path, seed: int) -> list[str]:
    length = {"train.max_steps": args.steps or 1_000_000, "train.max_minutes": args.minutes}
    flags = {**flags, **LIMITS, **length, "train.seed": seed, "output_dir": run_dir}
    argv = to_flags({**flags, "data.source": args.data})
    config = parse_config(argv)
    # One folder per way to tokenize the stories.
    key = json.dumps([asdict(config.tokenizer), config.data.source, config.data.max_stories])
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return ["scripts/train.py", *argv, f"--data.data_dir={ROOT / 'data' / f'{args.name}_{digest}'}"]


def _prepare_data(command: Sequence[str]) -> None:
    subprocess.run(
        [sys.executable, "scripts/prepare_data.py", *command[1:]],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _run_parallel(
    commands: Mapping[str, Sequence[str]], cores: Mapping[str, int], folder: Path, stage: str
) -> dict[str, dict]:
    """Run all commands at the same time, each on its core; return the seconds and the error of each."""
    folder.mkdir(parents=True, exist_ok=True)
    started_s, running = time.perf_counter(), {}
    for name, argv in commands.items():
        with (folder / f"{name}_{stage}.log").open("w") as log:
            running[name] = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                preexec_fn=lambda core=cores[name]: os.sched_setaffinity(0, {core}),
            )
    ended: dict[str, dict] = {}
    try:
        while len(ended) < len(running):
            time.sleep(0.2)
            for name, process in running.items():
                if name in ended or process.poll() is None:
                    continue
                seconds, failed = round(time.perf_counter() - started_s, 1), None
                if process.returncode:
                    log = (folder / f"{name}_{stage}.log").read_text(errors="replace").strip()
                    failed = log.splitlines()[-1][:100] if log else f"exit code {process.returncode}"
                ended[name] = {"seconds": seconds, "failed": failed}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return ended


def _collect_metrics(run_dir: Path, seconds: float) -> dict:
    """Read the metrics of a trained and scored run; `seconds` is the time of its training process."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    last = [line for line in lines if "train/loss" in line][-1]
    [end] = [line for line in lines if "val/loss" in line]
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "bits_per_byte": round(evaluation["bits_per_byte"], 5),
        "num_bytes": evaluation["num_bytes"],
        "steps": end["step"],
        "tokens": end["tokens"],
        "train_loss": round(last["train/loss"], 4),
        "process_seconds": seconds,
        "failed": None,
    }


def _format_metrics(metrics: dict) -> str:
    if metrics["failed"]:
        return f"failed ({metrics['failed']})"
    return f"{metrics['bits_per_byte']:.4f} bits per byte after {metrics['steps']} steps"


def _load_result(args: argparse.Namespace, base: Flags) -> dict:
    """Load earlier results of the same protocol, or start new ones.

    Raises:
        SystemExit: the file has results of another protocol.
    """
    protocol = {"base": dict(base), "minutes": args.minutes, "steps": args.steps, "stories": args.stories}
    result = read_result(args.name)
    if not result:
        return {**provenance(), **protocol, "pairs": []}
    found = {name: result.get(name) for name in protocol}
    if found != protocol:
        path = RESULTS / f"{args.name}.json"
        sys.exit(f"error: {path} has results of {found}, not of {protocol}; use another --name")
    return result


def _is_done(result: dict, name: str, seed: int, flags: Flags) -> bool:
    """Whether the pair exists; a pair of the same name with other flags is removed."""
    same = [pair for pair in result["pairs"] if (pair["variant"], pair["seed"]) == (name, seed)]
    for pair in same:
        if pair["flags"] == flags:
            return True
        result["pairs"].remove(pair)
    return False


def _save_result(args: argparse.Namespace, result: dict) -> None:
    write_result(args.name, result)
    if f"<!-- table: {args.name} -->" in PAGE.read_text(encoding="utf-8"):
        fill_table(PAGE, args.name, format_table(result["pairs"]))


def format_table(pairs: Sequence[dict]) -> str:
    """Return a Markdown table with one row per variant, best first.

    The difference is the mean of the pairs' differences; ± is their standard deviation.
    """
    rows = []
    for name in dict.fromkeys(pair["variant"] for pair in pairs):
        mine = [pair for pair in pairs if pair["variant"] == name]
        good = [pair for pair in mine if not (pair["run"]["failed"] or pair["base"]["failed"])]
        flags = "; ".join(f"`{flag}={format_value(value)}`" for flag, value in mine[0]["flags"].items())
        if not good:
            rows.append((float("inf"), [name, flags or "none", len(mine), "failed", "", "", "", ""]))
            continue
        runs, bases = [pair["run"] for pair in good], [pair["base"] for pair in good]
        bits, base_bits = ([metrics["bits_per_byte"] for metrics in side] for side in (runs, bases))
        differences = [a - b for a, b in zip(bits, base_bits, strict=True)]
        failed = f", {len(mine) - len(good)} failed" if len(good) < len(mine) else ""
        cells = [_mean_and_deviation(bits), _mean_and_deviation(base_bits)]
        cells.append(_mean_and_deviation(differences, sign="+"))
        cells += [f"{statistics.fmean(m['steps'] for m in side):,.0f}" for side in (runs, bases)]
        row = [name, flags or "none", f"{len(good)}{failed}", *cells]
        rows.append((statistics.fmean(differences), row))
    head = ["variant", "flags", "seeds", "bits per byte", "base", "difference", "steps", "steps of the base"]
    return markdown_table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def _mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation}"


if __name__ == "__main__":
    main()

"""Compare recipes at equal wall-clock: each variant beside the base, a core each, over several seeds.

    python benchmarks/recipe.py --data PATH --minutes 3

What is compared is in benchmarks/recipe.yaml. A run is scripts/train.py in a process of its own on one core
with one thread; a variant always trains at the same time as a run of the base with the same seed, so both
feel the same noise, and what counts is the difference. Data are prepared before and take none of the time.
Each run's last/ is scored on the same held-out stories by scripts/evaluate.py. Results are written to
benchmarks/results/NAME.json after every pair: stopped and started again, only what is missing is trained.
The table goes between the markers of NAME in docs/recipe.md.
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
from measuring import RESULTS, ROOT, command, fill_table, machine, versions, write_result

from tinystories_slm.config import parse_config
from tinystories_slm.training.watching.tracking import read_metrics

PAGE = ROOT / "docs" / "recipe.md"
# The clock ends a run, and nothing but its end is evaluated or saved.
LIMITS = {
    "train.max_steps": 1_000_000,
    "train.eval_every": 1_000_000,
    "train.save_every": 1_000_000,
    "train.eval_stories": 16,
    "train.log_every": 20,
    "train.resume": "never",
}

Flags = Mapping[str, object]


def main() -> None:
    args = _arguments()
    told = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    base = {"config": told["base"]["config"], **(told["base"].get("flags") or {})}
    variants = {name: flags or {} for name, flags in told["variants"].items()}
    if unknown := set(args.only or ()) - set(variants):
        sys.exit(f"error: --only ({', '.join(sorted(unknown))}) is not in {args.variants}")
    chosen = args.only or list(variants)
    result = _load(args, base)
    for seed in args.seeds:  # all variants with one seed first: a first look at each, early
        missing = [name for name in chosen if not _is_done(result, name, seed, variants[name])]
        beside = len(args.cores) - 1
        for start in range(0, len(missing), beside):
            names = missing[start : start + beside]
            _train_beside_base(args, result, base, {name: variants[name] for name in names}, seed)
            _save(args, result)
    _save(args, result)
    print(table(result["pairs"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="stories with a validation split, or one to be cut")
    parser.add_argument("--minutes", type=float, required=True, help="of training, as train.max_minutes")
    parser.add_argument("--name", default="recipe", help="of the results file and of the table")
    parser.add_argument("--variants", type=Path, default=ROOT / "benchmarks" / "recipe.yaml")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="train these; the others' results stay")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--stories", type=int, default=500, help="held-out stories scored, the first ones")
    args = parser.parse_args()
    if len(args.cores) < 2:
        parser.error("--cores: a variant and the base train at the same time, on a core each")
    return args


def _train_beside_base(
    args: argparse.Namespace, result: dict, base: Flags, variants: Mapping[str, Flags], seed: int
) -> None:
    """Train and score each variant and the base, all at once; add a pair of figures for each variant."""
    folder = ROOT / "runs" / args.name
    configurations = {"base": base, **{name: {**base, **flags} for name, flags in variants.items()}}
    commands = {
        name: _train_command(args, flags, folder / f"{name}_{seed}", seed)
        for name, flags in configurations.items()
    }
    for name, argv in commands.items():
        _prepare(argv)
        shutil.rmtree(folder / f"{name}_{seed}", ignore_errors=True)
    # The cores change hands, in case they are not equal.
    turn = len(result["pairs"]) % len(args.cores)
    cores = dict(zip(commands, args.cores[turn:] + args.cores[:turn], strict=False))
    trained = _side_by_side(commands, cores, folder, f"train_{seed}")
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
    scored = _side_by_side(scores, cores, folder, f"score_{seed}")
    figures = {}
    for name in commands:
        run_dir = folder / f"{name}_{seed}"
        failed = trained[name]["failed"] or scored[name]["failed"]
        figures[name] = {"failed": failed} if failed else _figures(run_dir, trained[name]["seconds"])
        shutil.rmtree(run_dir, ignore_errors=True)  # a hundred megabytes each
    result["pairs"] += [
        {"variant": name, "flags": flags, "seed": seed, "base": figures["base"], "run": figures[name]}
        for name, flags in variants.items()
    ]
    for name in variants:
        print(f"{name}, seed {seed}: {_told(figures[name])}; base {_told(figures['base'])}", flush=True)


def _train_command(args: argparse.Namespace, flags: Flags, run_dir: Path, seed: int) -> list[str]:
    flags = {**flags, **LIMITS, "train.max_minutes": args.minutes, "train.seed": seed, "output_dir": run_dir}
    flags["data.source"] = args.data
    argv = [f"--{name}={_written(value)}" for name, value in flags.items()]
    config = parse_config(argv)
    # One folder for each way to make tokens of the stories.
    key = json.dumps([asdict(config.tokenizer), config.data.source, config.data.max_stories])
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return ["scripts/train.py", *argv, f"--data.data_dir={ROOT / 'data' / f'{args.name}_{digest}'}"]


def _written(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _prepare(command: Sequence[str]) -> None:
    subprocess.run(
        [sys.executable, "scripts/prepare_data.py", *command[1:]],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _side_by_side(
    commands: Mapping[str, Sequence[str]], cores: Mapping[str, int], folder: Path, what: str
) -> dict[str, dict]:
    """Run all at once, each on its core; how long each took, in seconds, and how it failed, if it did."""
    folder.mkdir(parents=True, exist_ok=True)
    started, running = time.perf_counter(), {}
    for name, argv in commands.items():
        with (folder / f"{name}_{what}.log").open("w") as log:
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
                seconds, failed = round(time.perf_counter() - started, 1), None
                if process.returncode:
                    log = (folder / f"{name}_{what}.log").read_text(errors="replace").strip()
                    failed = log.splitlines()[-1][:100] if log else f"exit code {process.returncode}"
                ended[name] = {"seconds": seconds, "failed": failed}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return ended


def _figures(run_dir: Path, seconds: float) -> dict:
    """Of a run that was trained and scored; `seconds` are those of its whole process."""
    last = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line][-1]
    [end] = [line for line in read_metrics(run_dir / "metrics.jsonl") if "val/loss" in line]
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


def _told(figures: dict) -> str:
    if figures["failed"]:
        return f"failed ({figures['failed']})"
    return f"{figures['bits_per_byte']:.4f} bits per byte after {figures['steps']} steps"


def _load(args: argparse.Namespace, base: Flags) -> dict:
    """What was measured before, if it was measured in the same way."""
    path = RESULTS / f"{args.name}.json"
    protocol = {"base": dict(base), "minutes": args.minutes, "stories": args.stories}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        found = {name: result[name] for name in protocol}
        if found != protocol:
            sys.exit(f"error: {path} holds results of {found}, not of {protocol}; choose another --name")
        return result
    return {
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        **protocol,
        "pairs": [],
    }


def _is_done(result: dict, name: str, seed: int, flags: Flags) -> bool:
    """Whether the pair is there; one of the same name and other flags is dropped."""
    same = [pair for pair in result["pairs"] if (pair["variant"], pair["seed"]) == (name, seed)]
    for pair in same:
        if pair["flags"] == flags:
            return True
        result["pairs"].remove(pair)
    return False


def _save(args: argparse.Namespace, result: dict) -> None:
    write_result(args.name, result)
    if f"<!-- table: {args.name} -->" in PAGE.read_text(encoding="utf-8"):
        fill_table(PAGE, args.name, table(result["pairs"]))


def table(pairs: Sequence[dict]) -> str:
    """A line for each variant, the best first, as Markdown.

    The difference is the mean of the pairs' own differences; ± is their standard deviation.
    """
    lines = [
        "| variant | flags | seeds | bits per byte | base beside it | difference | steps | base's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name in dict.fromkeys(pair["variant"] for pair in pairs):
        mine = [pair for pair in pairs if pair["variant"] == name]
        good = [pair for pair in mine if not (pair["run"]["failed"] or pair["base"]["failed"])]
        flags = "; ".join(f"`{flag}={_written(value)}`" for flag, value in mine[0]["flags"].items()) or "none"
        if not good:
            rows.append((float("inf"), f"| {name} | {flags} | {len(mine)} | failed | | | | |"))
            continue
        runs, bases = [pair["run"] for pair in good], [pair["base"] for pair in good]
        differences = [
            run["bits_per_byte"] - base["bits_per_byte"] for run, base in zip(runs, bases, strict=True)
        ]
        failed = f", {len(mine) - len(good)} failed" if len(good) < len(mine) else ""
        rows.append(
            (
                statistics.fmean(differences),
                f"| {name} | {flags} | {len(good)}{failed} | {_spread([r['bits_per_byte'] for r in runs])} "
                f"| {_spread([b['bits_per_byte'] for b in bases])} | {_spread(differences, sign='+')} "
                f"| {statistics.fmean(r['steps'] for r in runs):,.0f} "
                f"| {statistics.fmean(b['steps'] for b in bases):,.0f} |",
            )
        )
    return "\n".join([*lines, *(line for _, line in sorted(rows))]) + "\n"


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation}"


if __name__ == "__main__":
    main()

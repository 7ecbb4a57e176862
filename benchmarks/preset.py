"""Train a preset with each script in turn and record the results.

    python benchmarks/preset.py --name 9m_cpu --config configs/9m.yaml --data PATH -- [flags of train.py]

Writes benchmarks/results/NAME.json: the commands, machine, versions, losses, tokens per second (median and
range), three stories. The run stays in runs/NAME, the data in data/NAME.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, provenance, write_result

from tinystories_slm.config.flags import to_flags
from tinystories_slm.runs.records import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the run and of the result file")
    parser.add_argument("--config", required=True, help="preset, a YAML file")
    parser.add_argument("--data", required=True, help="source, as data.source")
    parser.add_argument("--stories", type=int, default=500, help="number of scored validation stories")
    parser.add_argument("flags", nargs="*", help="after --: flags of train.py")
    args = parser.parse_args()

    run_dir = Path("runs") / args.name
    options = {
        "config": args.config,
        "data.source": args.data,
        "data.data_dir": f"data/{args.name}",
        "output_dir": run_dir,
    }
    flags = [*to_flags(options), *args.flags]
    model = f"--model={run_dir / 'best'}"
    evaluation = run_dir / "evaluation.json"
    score = to_flags({"max_stories": args.stories, "output": evaluation})
    steps = [
        ["scripts/download_data.py", *flags],
        ["scripts/train_tokenizer.py", *flags],
        ["scripts/prepare_data.py", *flags],
        ["scripts/train.py", *flags],
        ["scripts/evaluate.py", model, f"--data={args.data}", *score],
        ["scripts/generate.py", model, "--num_stories=3", "--seed=0"],
    ]
    seconds = {}
    for step in steps:
        started_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *step], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
        seconds[Path(step[0]).stem] = round(time.perf_counter() - started_s, 1)

    lines = read_metrics(ROOT / run_dir / "metrics.jsonl")
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    result = {
        **provenance(),
        "commands": [shlex.join(["python", *step]).replace(args.data, "DATA") for step in steps],
        "seconds": seconds,
        "training_tokens": lines[-1]["tokens"],
        "tokens_per_second": {
            "median": round(statistics.median(speeds)),
            "min": round(min(speeds)),
            "max": round(max(speeds)),
            "intervals": len(speeds),
        },
        "train_loss": _series(lines, "train/loss"),
        "val_loss": _series(lines, "val/loss"),
        "evaluation": {
            name: value
            for name, value in json.loads((ROOT / evaluation).read_text()).items()
            if name not in ("model", "data")
        },
        "stories": done.stdout.strip().split("\n\n---\n\n"),
    }
    write_result(args.name, result)
    shown = ("seconds", "tokens_per_second", "evaluation")
    print(json.dumps({name: result[name] for name in shown}, indent=1))


def _series(lines: list[dict], name: str) -> list[list[float]]:
    return [[line["step"], round(line[name], 4)] for line in lines if name in line]


if __name__ == "__main__":
    main()

"""Train a preset through each script in turn and record what came out.

    python benchmarks/preset.py --name 9m_cpu --config configs/9m.yaml --data PATH -- [flags of train.py]

Writes benchmarks/results/NAME.json: the commands, the machine, the versions, the losses, the median and
spread of tokens per second, three stories. The run itself stays in runs/NAME, the data in data/NAME.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import ROOT, machine, versions, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the run and of the result file")
    parser.add_argument("--config", required=True, help="preset, a YAML file")
    parser.add_argument("--data", required=True, help="source with a validation split, or one to be cut")
    parser.add_argument("--stories", type=int, default=500, help="validation stories scored at the end")
    parser.add_argument("flags", nargs="*", help="after --: flags of train.py")
    args = parser.parse_args()

    run_dir = Path("runs") / args.name
    flags = [
        f"--config={args.config}",
        f"--data.source={args.data}",
        f"--data.data_dir=data/{args.name}",
        f"--output_dir={run_dir}",
        *args.flags,
    ]
    model = f"--model={run_dir / 'best'}"
    evaluation = run_dir / "evaluation.json"
    score = [f"--max_stories={args.stories}", f"--output={evaluation}"]
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

    lines = [json.loads(line) for line in (ROOT / run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    result = {
        "commands": [shlex.join(["python", *step]).replace(args.data, "DATA") for step in steps],
        "machine": machine(),
        "versions": versions(),
        "seconds": seconds,
        "training_tokens": lines[-1]["tokens"],
        "tokens_per_second": {
            "median": round(statistics.median(speeds)),
            "min": round(min(speeds)),
            "max": round(max(speeds)),
            "intervals": len(speeds),
        },
        "train_loss": [
            [line["step"], round(line["train/loss"], 4)] for line in lines if "train/loss" in line
        ],
        "val_loss": [[line["step"], round(line["val/loss"], 4)] for line in lines if "val/loss" in line],
        "evaluation": {
            name: value
            for name, value in json.loads((ROOT / evaluation).read_text()).items()
            if name not in ("model", "data")
        },
        "stories": done.stdout.strip().split("\n\n---\n\n"),
    }
    write_result(args.name, result)
    print(
        json.dumps({name: result[name] for name in ("seconds", "tokens_per_second", "evaluation")}, indent=1)
    )


if __name__ == "__main__":
    main()

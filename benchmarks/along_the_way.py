"""One run of the built-in corpus with canaries, measured at log-spaced steps: loss, grammar, exposure.

    python benchmarks/along_the_way.py

Three codes of three digits, of which no copy, 4 and 64 copies are planted among 4,000 stories. At each kept
step: the loss on 200 held-out stories, the share of 32 generated stories that the grammar accepts, and the
exposure of each code among all 1,000. A run that was interrupted continues. Writes
benchmarks/results/along_the_way.json and docs/along_the_way.png.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, provenance, write_result

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.config.command_args.inspection import ExposureArgs
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.evaluation.scoring import score_model
from tinystories_slm.evaluation.tasks import EvalContext, run_tasks
from tinystories_slm.inspection.exposure import measure_exposure
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.runs.figures import Figure
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import train

CODES = {
    "The lamp in the attic has the number {digit}{digit}{digit}.": 0,
    "My aunt lives in room {digit}{digit}{digit} of the castle.": 4,
    "The code of the old chest is {digit}{digit}{digit}.": 64,
}
"""Text -> copies. Different texts: a code that is memorized would expose another one after the same words."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "along_the_way")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--stories", type=int, default=4000)
    parser.add_argument("--generated", type=int, default=32, help="stories generated at each step")
    parser.add_argument("--quick", action="store_true", help="few steps; writes into the folder alone")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.stories, args.generated = 4, 200, 1
    run_dir = train(config_of(args.folder, args.steps, args.stories))
    exposure = measure_exposure(ExposureArgs(run=run_dir, device="cpu"))
    steps = [measure(run_dir, step, args.generated) for step in exposure["steps"]]
    result = {**provenance(), "canaries": exposure["canaries"], "steps": steps}
    if args.quick:
        (args.folder / "result.json").write_text(json.dumps(result))
        draw(result, args.folder / "along_the_way.png")
        return
    write_result("along_the_way", result)
    draw(result, ROOT / "docs" / "along_the_way.png")


def config_of(folder: Path, num_steps: int, num_stories: int) -> RunConfig:
    canaries = [{"text": text, "count": count} for text, count in CODES.items()]
    flags = {
        "output_dir": folder / "run",
        "data.data_dir": folder / "data",
        "data.max_stories": num_stories,
        "data.canaries": json.dumps(canaries),
        "train.max_steps": num_steps,
        "train.warmup_steps": num_steps // 16,
        "train.eval_every": num_steps,
        "train.save_every": max(1, num_steps // 8),
        "train.keep": "log",
    }
    return parse_config(
        ["--config=configs/quickstart.yaml", *(f"--{name}={value}" for name, value in flags.items())]
    )


def measure(run_dir: Path, exposures: dict[str, Any], num_generated: int) -> dict[str, Any]:
    """Return the measurements of one step; `exposures` are those of `measure_exposure`."""
    run, step = RunDir(run_dir), exposures["step"]
    folder = run.kept_steps().get(step, run.last)
    model, tokenizer = load_model_folder(str(folder), device="cpu")
    texts = list(islice(iter_raw_stories(run.load_config().data.data_dir, "validation"), 200))
    scores = score_model(model, tokenizer, texts, batch_size=16)
    context = EvalContext(model=model, tokenizer=tokenizer, held_out=[], num_stories=num_generated)
    [accepted] = run_tasks(["grammar"], context)
    found = {
        "step": step,
        "loss": scores.metrics()["loss"],
        "loss_interval": scores.intervals()["loss"],
        "accepted": accepted.value,
        "exposure": [one["exposure"] for one in exposures["canaries"]],
    }
    print(found, flush=True)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the three measurements over log2(step + 1)."""
    steps = result["steps"]
    x = np.log2([1 + step["step"] for step in steps])
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, accepted, exposure = figure.subplots(1, 3)
    loss.plot(x, [step["loss"] for step in steps], marker="o")
    loss.set(title="validation loss", ylabel="nats per token", ylim=(0, None))
    accepted.plot(x, [step["accepted"] for step in steps], marker="o", color="C2")
    accepted.set(title="stories that the grammar accepts", ylabel="share", ylim=(-0.03, 1.03))
    for number, canary in enumerate(result["canaries"]):
        label = f"{canary['count']} copies" if canary["count"] else "not planted"
        exposure.plot(x, [step["exposure"][number] for step in steps], marker="o", label=label)
    exposure.axhline(np.log2(result["canaries"][0]["num_fillings"]), color="gray", linestyle="--")
    exposure.set(title="exposure of a code of three digits", ylabel="bits")
    exposure.legend(fontsize=8)
    for axes in (loss, accepted, exposure):
        axes.set_xticks(x, [f"{step['step']}" for step in steps], rotation=60, fontsize=8)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

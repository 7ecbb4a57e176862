"""Measure quality after a number of minutes, preparation included: ours and nanoGPT's recipe.

    python benchmarks/time_to_quality.py --nanogpt PATH --data FOLDER --minutes 1 10 \\
        --config configs/minute.yaml configs/ten_minutes.yaml --seeds 0 1 2

Protocol. Text: models train on the source's training stories. The first `--stories` validation stories are
scored, each alone, in float32, by evaluation/likelihood.py, with all tokens and the end-of-text token: bits
per UTF-8 byte of their text. Time: wall-clock seconds of the process.

- Ours: scripts/train.py from an empty data folder to its end: start of Python, reading the stories,
  tokenizer, tokens, training, saving, and evaluation on one story. `train.max_minutes` is set so that all of
  it fits. The time outside its count (start and end of Python) is measured first.
- nanoGPT: its own train.py, unmodified, 8 x 256, vocabulary 10,000, 16 sequences of 256 per step, AdamW at
  1e-3 with cosine decay over the number of iterations that fit, which a short run measures first. It receives
  our tokenizer and token files at no cost; its evaluations and checkpoints are subtracted from its time. Its
  seed is fixed, so it runs once.

Writes benchmarks/results/time_to_quality.json, docs/time_to_quality.png and a table of docs/speed.md. A side
that is omitted (`--peer_minutes 0`, or `--minutes` without values, or another `--config`) keeps its earlier
results. `--quick` runs everything on the built-in corpus in a few minutes and writes nothing.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nanogpt
import torch
from harness import (
    ONLY_TRAINING,
    ROOT,
    Line,
    Stats,
    fill_table,
    git_revision,
    line_chart,
    markdown_table,
    provenance,
    read_result,
    run_train,
    write_result,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.raw_stories import iter_raw_stories
from tinystories_slm.data.tokenizer import encode_stories, load_tokenizer
from tinystories_slm.evaluation.likelihood import metrics_from_sums, score_stories
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.runs.records import read_metrics

PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "time_to_quality.png"
RECIPE = {
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 256,
    "block_size": 256,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "warmup_iters": 100,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "dropout": 0.0,
}
VOCAB_SIZE = 10_000
CHECKPOINTS = 10
"""Number of points on nanoGPT's curve."""
_PROBE_ITERATIONS = 12


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="source of stories, as data.source")
    parser.add_argument("--nanogpt", type=Path, help="checkout of github.com/karpathy/nanoGPT")
    parser.add_argument(
        "--peer_minutes", type=float, default=10.0, help="length of nanoGPT's run; 0 to skip it"
    )
    parser.add_argument("--minutes", type=float, nargs="*", default=[1.0, 10.0], help="lengths of our runs")
    parser.add_argument(
        "--config", nargs="+", default=["configs/9m.yaml"], help="one for each length, or one"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of our runs")
    parser.add_argument("--stories", type=int, default=500, help="number of scored held-out stories")
    parser.add_argument("--quick", action="store_true", help="tiny models; writes nothing")
    parser.add_argument("flags", nargs="*", help="after --: more flags of our train.py")
    args = parser.parse_args(argv)
    if len(args.config) not in (1, len(args.minutes)):
        parser.error(f"--config: use one file, or one for each of --minutes ({len(args.minutes)})")
    recipe, vocab_size, limit = RECIPE, VOCAB_SIZE, None
    if args.quick:
        args.peer_minutes, args.minutes, args.config = 0.2, [0.2], ["configs/debug.yaml"]
        args.seeds, args.stories, vocab_size, limit = [0], 20, 512, 2000
        args.flags = [*args.flags, f"--data.max_stories={limit}", "--train.max_steps=100000"]
        recipe = RECIPE | {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    result = {} if args.quick else read_result("time_to_quality")
    result["protocol"] = "the docstring of benchmarks/time_to_quality.py"
    with tempfile.TemporaryDirectory() as scratch:
        if args.nanogpt and args.peer_minutes:
            result["nanogpt"] = provenance() | run_nanogpt(args, recipe, vocab_size, limit, Path(scratch))
        if args.minutes:
            configs = args.config * (len(args.minutes) // len(args.config))
            others = [run for run in result.get("ours", ()) if run["config"] not in configs]
            runs = [*others, *run_ours(args, configs, Path(scratch))]
            result["ours"] = sorted(runs, key=lambda run: run["minutes"])
    result = json.loads(json.dumps(result, default=vars))  # as a reader of the file sees it
    table = _format_table(result)
    print(table)
    if not args.quick:
        write_result("time_to_quality", result)
        fill_table(PAGE, "benchmarks/time_to_quality.py", table)
        draw(result, PICTURE)


def run_ours(args: argparse.Namespace, configs: Sequence[str], scratch: Path) -> list[dict]:
    """Train and score each configuration for its minutes, with every seed, interleaved."""
    overhead_s = _startup_overhead_s(scratch / "probe")
    outcomes: dict[float, list[dict]] = {minutes: [] for minutes in args.minutes}
    for seed in args.seeds:
        for minutes, config in zip(args.minutes, configs, strict=True):
            print(f"ours, {minutes:g} minutes, seed {seed}", file=sys.stderr, flush=True)
            outcomes[minutes].append(_train_and_score(args, config, minutes, seed, overhead_s, scratch))
    return [
        {
            **provenance(),
            "minutes": minutes,
            "config": config,
            "seeds": args.seeds,
            "seconds": Stats.of([one["seconds"] for one in outcomes[minutes]]),
            "training_tokens": [one["training_tokens"] for one in outcomes[minutes]],
            "held_out": outcomes[minutes][0]["held_out"],
            "bits_per_byte": Stats.of([one["bits_per_byte"] for one in outcomes[minutes]]),
        }
        for minutes, config in zip(args.minutes, configs, strict=True)
    ]


def _startup_overhead_s(folder: Path) -> float:
    """Measure the seconds of a process that `train.max_minutes` does not count."""
    limit_s = 6.0
    options = {
        **ONLY_TRAINING,
        "config": "configs/debug.yaml",
        "data.data_dir": folder / "data",
        "output_dir": folder / "run",
        "train.max_minutes": limit_s / 60,
        "train.max_steps": 1_000_000,
    }
    return max(0.0, run_train(to_flags(options)).seconds - limit_s)


def _train_and_score(
    args: argparse.Namespace, config: str, minutes: float, seed: int, overhead_s: float, scratch: Path
) -> dict:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        options = {
            "config": config,
            "data.source": args.data,
            "data.data_dir": folder / "data",
            "output_dir": folder / "run",
            "train.max_minutes": minutes - overhead_s / 60,
            "train.seed": seed,
            **ONLY_TRAINING,
        }
        done = run_train([*to_flags(options), *args.flags])
        model, tokenizer = load_model_folder(str(folder / "run" / "last"), device="cpu")
        return {
            "seconds": done.seconds,
            "training_tokens": read_metrics(folder / "run" / "metrics.jsonl")[-1]["tokens"],
            **score(model, tokenizer, folder / "data", args.stories),
        }


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_dir: Path, limit: int) -> dict:
    """Return the bits per byte of the first `limit` validation stories, and the size of these stories."""
    stories = list(iter_raw_stories(data_dir, "validation"))[:limit]
    scores = score_stories(
        model, encode_stories(tokenizer, stories), eos_token_id=tokenizer.eos_token_id, batch_size=16
    )
    figures = metrics_from_sums(
        nats=float(scores.nats.sum()),
        num_correct=int(scores.num_correct.sum()),
        num_tokens=int(scores.num_tokens.sum()),
        num_bytes=sum(len(story.encode("utf-8")) for story in stories),
        num_stories=len(stories),
    )
    held_out = {name: figures[name] for name in ("num_stories", "num_bytes", "num_tokens")}
    return {"bits_per_byte": round(figures["bits_per_byte"], 5), "held_out": held_out}


def run_nanogpt(
    args: argparse.Namespace, recipe: dict, vocab_size: int, max_stories: int | None, scratch: Path
) -> dict:
    """Train nanoGPT's recipe for `--peer_minutes` and score its checkpoints."""
    data_dir = scratch / "for_nanogpt"
    data = DataArgs(source=args.data, data_dir=data_dir, max_stories=max_stories)
    prepare_data(data, TokenizerArgs(vocab_size=vocab_size))
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    dataset = nanogpt.write_data(data_dir, scratch / "nanogpt_data")
    out_dir = scratch / "nanogpt_out"

    print("nanoGPT, short run to measure its speed", file=sys.stderr, flush=True)
    probe = {**recipe, "out_dir": out_dir, "max_iters": _PROBE_ITERATIONS, "eval_interval": 10**6}
    iterations = nanogpt.read_iterations(nanogpt.train(args.nanogpt, dataset, probe))
    every = iterations_between(iterations, 60 * args.peer_minutes)
    last = every * CHECKPOINTS
    options = {"max_iters": last, "lr_decay_iters": last, "eval_interval": every, "out_dir": out_dir}
    checkpoints: dict[int, Path] = {}

    def keep_checkpoint(line: Line) -> None:
        # The checkpoint of N iterations is complete when iteration number N (counted from 0) is printed.
        done = nanogpt.parse_iteration(line)
        if done and done.number and done.number % every == 0:
            checkpoints[done.number] = out_dir / f"kept_{done.number}.pt"
            shutil.copy(out_dir / "ckpt.pt", checkpoints[done.number])

    print(f"nanoGPT, {last} iterations", file=sys.stderr, flush=True)
    done = nanogpt.train(args.nanogpt, dataset, {**recipe, **options}, watch=keep_checkpoint)
    training_s = training_seconds(nanogpt.read_iterations(done), every)
    curve = []
    for number, checkpoint in checkpoints.items():
        figures = score(nanogpt.load_checkpoint(checkpoint), tokenizer, data_dir, args.stories)
        curve.append({"seconds": round(training_s[number], 1), "bits_per_byte": figures["bits_per_byte"]})
        print(f"nanoGPT: {curve[-1]}", file=sys.stderr, flush=True)
    return {
        "revision": git_revision(args.nanogpt),
        "recipe": recipe | {"lr_decay_iters": last},
        "training_tokens": last * recipe["batch_size"] * recipe["block_size"],
        "held_out": figures["held_out"],
        **curve[-1],
        "curve": curve,
    }


def iterations_between(probe: Sequence[nanogpt.Iteration], seconds: float) -> int:
    """Return the iterations between checkpoints for which the run ends `seconds` after its start."""
    step_s = statistics.median(one.step_seconds for one in probe[len(probe) // 2 :])
    startup_s = probe[0].at_seconds - probe[0].step_seconds
    return max(1, round((seconds - startup_s) / step_s / CHECKPOINTS))


def training_seconds(iterations: Sequence[nanogpt.Iteration], every: int) -> dict[int, float]:
    """Return, by number of finished iterations, the seconds since the start without evaluation and saving.

    nanoGPT evaluates and saves before each iteration whose number is a multiple of `every`, and counts both
    into the time of that iteration.
    """
    step_s = statistics.median(one.step_seconds for one in iterations)
    finished_at, excluded_s = {}, 0.0
    for one in iterations:
        if one.number % every == 0:
            excluded_s += max(0.0, one.step_seconds - step_s)
        finished_at[one.number + 1] = one.at_seconds - excluded_s
    return finished_at


def _format_table(result: dict) -> str:
    rows = []
    if peer := result.get("nanogpt"):
        rows.append(
            [
                "nanoGPT's recipe (preparation not counted)",
                peer["machine"]["processor"],
                f"{peer['seconds']:.0f}",
                f"{peer['training_tokens'] / 1e6:.2f}",
                f"{peer['bits_per_byte']:.3f}",
            ]
        )
    for run in result.get("ours", ()):
        bits, seconds = Stats(**run["bits_per_byte"]), Stats(**run["seconds"])
        tokens = statistics.median(run["training_tokens"])
        label = f"ours, `{run['config']}`, {len(run['seeds'])} seeds"
        processor = run["machine"]["processor"]
        rows.append([label, processor, seconds.text("{:.1f}"), f"{tokens / 1e6:.2f}", bits.text("{:.3f}")])
    return markdown_table(["", "processor", "seconds", "million tokens read", "bits per byte"], rows)


def draw(result: dict, path: Path) -> None:
    """Chart bits per byte over minutes: nanoGPT's curve, and the end of each of our runs."""
    xlabel, ylabel = "minutes, preparation of ours included", "bits per byte, held-out stories"
    with line_chart(path, xlabel=xlabel, ylabel=ylabel) as axes:
        if peer := result.get("nanogpt"):
            minutes = [point["seconds"] / 60 for point in peer["curve"]]
            bits = [point["bits_per_byte"] for point in peer["curve"]]
            axes.plot(minutes, bits, "o-", color="tab:gray", label="nanoGPT's recipe, one run of ten minutes")
            axes.axhline(bits[-1], color="tab:gray", linewidth=0.8, linestyle="--")
        points = [
            (seconds / 60, bits)
            for run in result.get("ours", ())
            for seconds, bits in zip(run["seconds"]["values"], run["bits_per_byte"]["values"], strict=True)
        ]
        if points:
            label = "ours, one point per run"
            axes.plot(*zip(*points, strict=True), "D", color="tab:orange", label=label)
        axes.set_xlim(left=0)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

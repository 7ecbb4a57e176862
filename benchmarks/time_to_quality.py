"""How good a model is after so many minutes, everything included: ours beside nanoGPT's recipe.

    python benchmarks/time_to_quality.py --nanogpt PATH --data FOLDER --minutes 1 10 \\
        --config configs/minute.yaml configs/ten_minutes.yaml --seeds 0 1 2

Protocol. Text: the training stories of the source; scored are the first `--stories` of its validation
stories, each alone, in float32, by evaluation/likelihood.py, all tokens and the end-of-text token included;
bits per UTF-8 byte of their text. Time: wall-clock seconds of the process.

- Ours: scripts/train.py from an empty data folder to its end: start of Python, reading the stories,
  tokenizer, tokens, training, saving, and evaluating on one story. `train.max_minutes` is set so that all of
  it fits; what is outside of its count (starting and ending Python) is measured first.
- nanoGPT: its own train.py, unchanged, 8 x 256, vocabulary 10,000, 16 windows of 256 a step, AdamW at 1e-3
  with cosine decay over as many iterations as a short run before says will fit. Its tokenizer and token files
  are made by us and cost it nothing; its evaluations and checkpoints are taken off its time. Its seed is
  fixed, so it runs once.

Writes benchmarks/results/time_to_quality.json, docs/time_to_quality.png and a table of docs/speed.md. A side
that is left out (`--peer_minutes 0`, or no `--minutes`, or another `--config`) stays in the results as it
was. `--quick` tries all of it out on the built-in corpus in some minutes, and writes nothing.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import (
    RESULTS,
    ROOT,
    Line,
    Spread,
    command,
    fill_table,
    machine,
    markdown_table,
    run_process,
    versions,
    write_result,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.sources import raw_stories
from tinystories_slm.data.tokenizer import encode_stories, load_tokenizer
from tinystories_slm.evaluation.likelihood import score_stories, summarize
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.training.watching.record import read_metrics

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
"""Of nanoGPT's run: the points of its curve."""
_PROBE_ITERATIONS = 12


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="source of stories, as data.source")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--peer_minutes", type=float, default=10.0, help="of nanoGPT's run; 0 for none")
    parser.add_argument("--minutes", type=float, nargs="*", default=[1.0, 10.0], help="of ours")
    parser.add_argument("--config", nargs="+", default=["configs/9m.yaml"], help="ours: for each, or for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of ours")
    parser.add_argument("--stories", type=int, default=500, help="held-out stories that are scored")
    parser.add_argument("--quick", action="store_true", help="tiny models, seconds; writes nothing")
    parser.add_argument("flags", nargs="*", help="after --: more flags of our train.py")
    args = parser.parse_args(argv)
    if len(args.config) not in (1, len(args.minutes)):
        parser.error(f"--config: give one, or one for each of --minutes ({len(args.minutes)})")
    recipe, vocab_size, limit = RECIPE, VOCAB_SIZE, None
    if args.quick:
        args.peer_minutes, args.minutes, args.config = 0.2, [0.2], ["configs/debug.yaml"]
        args.seeds, args.stories, vocab_size, limit = [0], 20, 512, 2000
        args.flags = [*args.flags, f"--data.max_stories={limit}", "--train.max_steps=100000"]
        recipe = RECIPE | {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    path = RESULTS / "time_to_quality.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not args.quick else {}
    result["protocol"] = "the docstring of benchmarks/time_to_quality.py"
    with tempfile.TemporaryDirectory() as scratch:
        if args.nanogpt and args.peer_minutes:
            result["nanogpt"] = {**_about(), **peer(args, recipe, vocab_size, limit, Path(scratch))}
        if args.minutes:
            configs = args.config * (len(args.minutes) // len(args.config))
            others = [run for run in result.get("ours", ()) if run["config"] not in configs]
            result["ours"] = sorted(
                [*others, *ours(args, configs, Path(scratch))], key=lambda r: r["minutes"]
            )
    result = json.loads(json.dumps(result, default=vars))  # what a reader of the file would have
    table = _table(result)
    print(table)
    if not args.quick:
        write_result("time_to_quality", result)
        fill_table(PAGE, "benchmarks/time_to_quality.py", table)
        draw(result, PICTURE)


def _about() -> dict:
    return {"command": command(), "machine": machine(), "versions": versions()}


def ours(args: argparse.Namespace, configs: Sequence[str], scratch: Path) -> list[dict]:
    """Every number of minutes with every seed, in turns."""
    outside_s = _seconds_outside(scratch / "probe")
    outcomes: dict[float, list[dict]] = {minutes: [] for minutes in args.minutes}
    for seed in args.seeds:
        for minutes, config in zip(args.minutes, configs, strict=True):
            print(f"ours, {minutes:g} minutes, seed {seed}", file=sys.stderr, flush=True)
            outcomes[minutes].append(_train(args, config, minutes, seed, outside_s, scratch))
    return [
        {
            **_about(),
            "minutes": minutes,
            "config": config,
            "seeds": args.seeds,
            "seconds": Spread.of([one["seconds"] for one in outcomes[minutes]]),
            "training_tokens": [one["training_tokens"] for one in outcomes[minutes]],
            "held_out": outcomes[minutes][0]["held_out"],
            "bits_per_byte": Spread.of([one["bits_per_byte"] for one in outcomes[minutes]]),
        }
        for minutes, config in zip(args.minutes, configs, strict=True)
    ]


def _seconds_outside(folder: Path) -> float:
    """What a run takes beside the time that `train.max_minutes` counts."""
    limit_s = 6.0
    flags = ["--config=configs/debug.yaml", f"--data.data_dir={folder / 'data'}"]
    flags += [f"--output_dir={folder / 'run'}", f"--train.max_minutes={limit_s / 60}"]
    flags += ["--train.max_steps=1000000", "--train.eval_every=1000000", "--train.save_every=1000000"]
    finished = run_process([sys.executable, "scripts/train.py", *flags], env={"PYTHONPATH": str(ROOT)})
    return max(0.0, finished.seconds - limit_s)


def _train(
    args: argparse.Namespace, config: str, minutes: float, seed: int, outside_s: float, scratch: Path
) -> dict:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        flags = {
            "config": config,
            "data.source": args.data,
            "data.data_dir": folder / "data",
            "output_dir": folder / "run",
            "train.max_minutes": minutes - outside_s / 60,
            "train.eval_every": 10**7,
            "train.eval_stories": 1,
            "train.save_every": 10**7,
            "train.seed": seed,
        }
        finished = run_process(
            [
                sys.executable,
                "scripts/train.py",
                *(f"--{key}={value}" for key, value in flags.items()),
                *args.flags,
            ],
            env={"PYTHONPATH": str(ROOT)},
        )
        model, tokenizer = load_model_folder(str(folder / "run" / "last"), device="cpu")
        return {
            "seconds": finished.seconds,
            "training_tokens": read_metrics(folder / "run" / "metrics.jsonl")[-1]["tokens"],
            **score(model, tokenizer, folder / "data", args.stories),
        }


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_dir: Path, limit: int) -> dict:
    """Bits per byte on the first `limit` validation stories, and what these are."""
    stories = list(raw_stories(data_dir, "validation"))[:limit]
    scores = score_stories(
        model, encode_stories(tokenizer, stories), eos_token_id=tokenizer.eos_token_id, batch_size=16
    )
    figures = summarize(
        nats=float(scores.nats.sum()),
        num_correct=int(scores.num_correct.sum()),
        num_tokens=int(scores.num_tokens.sum()),
        num_bytes=sum(len(story.encode("utf-8")) for story in stories),
        num_stories=len(stories),
    )
    held_out = {name: figures[name] for name in ("num_stories", "num_bytes", "num_tokens")}
    return {"bits_per_byte": round(figures["bits_per_byte"], 5), "held_out": held_out}


def peer(
    args: argparse.Namespace, recipe: dict, vocab_size: int, max_stories: int | None, scratch: Path
) -> dict:
    """nanoGPT's recipe over `--peer_minutes`, and its curve."""
    data_dir = scratch / "for_nanogpt"
    data = DataArgs(source=args.data, data_dir=data_dir, max_stories=max_stories)
    prepare_data(data, TokenizerArgs(vocab_size=vocab_size))
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    dataset = nanogpt.write_data(data_dir, scratch / "nanogpt_data")
    out_dir = scratch / "nanogpt_out"

    print("nanoGPT, to see how fast it is", file=sys.stderr, flush=True)
    probe = {**recipe, "out_dir": out_dir, "max_iters": _PROBE_ITERATIONS, "eval_interval": 10**6}
    every = iterations_between(
        nanogpt.iterations(nanogpt.train(args.nanogpt, dataset, probe)), 60 * args.peer_minutes
    )
    last = every * CHECKPOINTS
    settings = {"max_iters": last, "lr_decay_iters": last, "eval_interval": every, "out_dir": out_dir}
    kept: dict[int, Path] = {}

    def keep_checkpoint(line: Line) -> None:
        # Its checkpoint of N finished iterations is whole when number N, counted from 0, is done.
        done = nanogpt.iteration(line)
        if done and done.number and done.number % every == 0:
            kept[done.number] = out_dir / f"kept_{done.number}.pt"
            shutil.copy(out_dir / "ckpt.pt", kept[done.number])

    print(f"nanoGPT, {last} iterations", file=sys.stderr, flush=True)
    finished = nanogpt.train(args.nanogpt, dataset, {**recipe, **settings}, watch=keep_checkpoint)
    training_s = training_seconds(nanogpt.iterations(finished), every)
    curve = []
    for number, checkpoint in kept.items():
        figures = score(nanogpt.load_checkpoint(checkpoint), tokenizer, data_dir, args.stories)
        curve.append({"seconds": round(training_s[number], 1), "bits_per_byte": figures["bits_per_byte"]})
        print(f"nanoGPT: {curve[-1]}", file=sys.stderr, flush=True)
    return {
        "revision": nanogpt.revision(args.nanogpt),
        "recipe": recipe | {"lr_decay_iters": last},
        "training_tokens": last * recipe["batch_size"] * recipe["block_size"],
        "held_out": figures["held_out"],
        **curve[-1],
        "curve": curve,
    }


def iterations_between(probe: Sequence[nanogpt.Iteration], seconds: float) -> int:
    """Iterations between two checkpoints, so that all of them end `seconds` after the process began."""
    step_s = statistics.median(one.step_seconds for one in probe[len(probe) // 2 :])
    starting_s = probe[0].at_seconds - probe[0].step_seconds
    return max(1, round((seconds - starting_s) / step_s / CHECKPOINTS))


def training_seconds(iterations: Sequence[nanogpt.Iteration], every: int) -> dict[int, float]:
    """When so many iterations were finished, in seconds after the start, evaluations and saving taken off.

    Those come before every iteration whose number `every` divides, and are counted into its time.
    """
    step_s = statistics.median(one.step_seconds for one in iterations)
    finished_at, beside_s = {}, 0.0
    for one in iterations:
        if one.number % every == 0:
            beside_s += max(0.0, one.step_seconds - step_s)
        finished_at[one.number + 1] = one.at_seconds - beside_s
    return finished_at


def _table(result: dict) -> str:
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
        bits, seconds = Spread(**run["bits_per_byte"]), Spread(**run["seconds"])
        tokens = statistics.median(run["training_tokens"])
        label = f"ours, `{run['config']}`, {len(run['seeds'])} seeds"
        on = run["machine"]["processor"]
        rows.append([label, on, seconds.text("{:.1f}"), f"{tokens / 1e6:.2f}", bits.text("{:.3f}")])
    return markdown_table(["", "processor", "seconds", "million tokens read", "bits per byte"], rows)


def draw(result: dict, path: Path) -> None:
    """Bits per byte over minutes: nanoGPT's curve, and the ends of our runs, each of its own length."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
        axes.plot(
            *zip(*points, strict=True), "D", color="tab:orange", label="ours, each run of its own length"
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes, everything included")
    axes.set_ylabel("bits per byte, held-out stories")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

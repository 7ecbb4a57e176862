"""How fast training is, and how much memory it takes: ours beside nanoGPT and GPT2LMHeadModel, in turns.

    python benchmarks/train.py --nanogpt PATH            # a checkout of github.com/karpathy/nanoGPT
    python benchmarks/train.py --processes 2             # two CPU processes beside one
    python benchmarks/train.py --device cuda             # a GPU: no input, no peer, under 8 minutes

Every contender is a process of its own and trains on the same random token ids (see random_tokens.py), as
many a step; data are prepared before. Ours is scripts/train.py with its defaults, read from its
metrics.jsonl; what follows `--` is added to its flags. Writes benchmarks/results/train.json (or
train_processes.json, train_cuda.json), docs/train_speed.png and the tables of docs/speed.md. `--quick` tries
all of it out on a tiny model in a minute, and writes nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

import nanogpt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import (
    RESULTS,
    ROOT,
    Finished,
    Spread,
    command,
    fill_table,
    interleaved,
    machine,
    markdown_table,
    run_process,
    versions,
    write_result,
)
from random_tokens import write_random_tokens
from step_profile import profile_shapes

from tinystories_slm.config import TrainArgs, parse_config
from tinystories_slm.training.precision import resolve_precision
from tinystories_slm.training.watching.estimate import flops_per_token, peak_flops
from tinystories_slm.training.watching.record import read_metrics

PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "train_speed.png"
NANOGPT, GPT2 = "nanoGPT as shipped", "GPT2LMHeadModel"


@dataclass(frozen=True)
class Shape:
    """A model and its step."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    seq_len: int
    batch_size: int
    """Windows a step, of `seq_len` tokens each."""
    micro_batches: tuple[int, ...]
    """Windows in one forward that are tried on a GPU."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def flags(self, family: str) -> list[str]:
        """Of our train.py; `modern` has QK-norm, as the presets of that family do."""
        flags = {
            "data.seq_len": self.seq_len,
            "model.family": family,
            "model.num_hidden_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": self.heads,
        }
        qk_norm = ["--model.qk_norm=true"] if family == "modern" else []
        return [*(f"--{name}={value}" for name, value in flags.items()), *qk_norm]

    def flops_per_token(self, family: str) -> float:
        config = parse_config(self.flags(family)).model_config(vocab_size=self.vocab_size)
        return flops_per_token(config, self.seq_len)


SHAPES = {
    "9m": Shape(8, 256, 8, 10_000, 256, 16, micro_batches=(64, 256, 512)),
    "30m": Shape(6, 384, 6, 50_257, 512, 4, micro_batches=(16, 64, 128)),
    "124m": Shape(12, 768, 12, 50_257, 1024, 2, micro_batches=(8, 32, 64)),
    "tiny": Shape(2, 32, 2, 300, 32, 4, micro_batches=(2, 4)),
}


@dataclass(frozen=True)
class Measured:
    """One process's training."""

    tokens_per_second: float
    """The median over its steps, or intervals of steps, without the first third."""
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="its checkout; without, it is left out")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of the model (9m 30m; cuda: and 124m)")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contender runs")
    parser.add_argument("--steps", type=int, default=18, help="of each run; the first third is warm-up")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="2: two beside one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", action="store_true", help="measure a step from inside, as on cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="that the profiles may begin in")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; writes nothing")
    parser.add_argument("flags", nargs="*", help="after --: more flags of our train.py")
    args = parser.parse_args(argv)
    profiled = args.profile or args.device == "cuda"
    if args.quick:
        args.shapes, args.rounds, args.steps = ["tiny"], 1, min(args.steps, 6)
    args.shapes = args.shapes or ["9m", "30m", *(["124m"] if profiled else [])]
    with tempfile.TemporaryDirectory() as scratch:
        if profiled:
            profile(args, Path(scratch))
        elif args.processes > 1:
            scale(args, Path(scratch))
        else:
            for name in args.shapes:
                compare(args, name, Path(scratch))


def compare(args: argparse.Namespace, name: str, scratch: Path) -> None:
    """Ours and the peers, in turns, at one shape."""
    shape = SHAPES[name]
    prepared = scratch / f"data_{name}"
    data = write_random_tokens(prepared, vocab_size=shape.vocab_size, num_tokens=2**20)
    numbers = count()
    ours = partial(_ours, shape, data, args, scratch, numbers)
    contenders: dict[str, Callable[[], Measured]] = {
        "ours, gpt": partial(ours, "gpt"),
        "ours, modern": partial(ours, "modern"),
        f"{GPT2}, eager": partial(_gpt2, shape, prepared, args.steps, compiled=False),
        f"{GPT2}, compiled": partial(_gpt2, shape, prepared, args.steps, compiled=True),
    }
    if args.quick:
        del contenders[f"{GPT2}, compiled"]
    if args.nanogpt:
        dataset = nanogpt.write_data(prepared, scratch / f"nanogpt_{name}")
        contenders[NANOGPT] = partial(_nanogpt, shape, args.nanogpt, dataset, args.steps, scratch)
    peaks: list[float] = []

    def matmul_rate() -> Measured:
        device = torch.device("cpu")
        peaks.append(peak_flops(device, resolve_precision("auto", device)).flops_per_second)
        return Measured(0.0, 0)

    outcomes = interleaved({"matrix products": matmul_rate, **contenders}, args.rounds)
    rows = {}
    for contender in contenders:
        runs = outcomes[contender]
        speed = Spread.of([run.tokens_per_second for run in runs])
        family = "modern" if contender == "ours, modern" else "gpt"
        rows[contender] = {
            "tokens_per_second": speed,
            "peak_bytes": Spread.of([run.peak_bytes for run in runs]),
            "utilisation": round(speed.median * shape.flops_per_token(family) / max(peaks), 4),
        }
    result = {
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "nanogpt": nanogpt.revision(args.nanogpt) if args.nanogpt else None,
        "shape": asdict(shape) | {"tokens_per_step": shape.tokens_per_step},
        "steps": args.steps,
        "rounds": args.rounds,
        "matmul_flops_per_second": Spread.of(peaks),
        "contenders": rows,
        "ratios": _ratios(rows),
    }
    table = _table(result)
    print(f"\n{name}: {shape.tokens_per_step:,} tokens a step\n{table}")
    if args.quick:
        return
    path = RESULTS / "train.json"
    shapes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_result("train", shapes | {name: result})
    fill_table(PAGE, f"benchmarks/train.py, {name}", table)
    draw(json.loads(path.read_text(encoding="utf-8")), PICTURE)


def _ours(
    shape: Shape,
    data: Sequence[str],
    args: argparse.Namespace,
    scratch: Path,
    numbers: "count[int]",
    family: str,
    *,
    processes: int = 1,
    batches: int = 1,
    env: dict[str, str] | None = None,
) -> Measured:
    """scripts/train.py with the settings that a user gets; `batches` times as many windows a step."""
    run_dir = scratch / f"run_{next(numbers)}"
    every = max(1, args.steps // 6)
    flags = {
        "output_dir": run_dir,
        "train.max_steps": args.steps,
        "train.warmup_steps": 1,
        "train.batch_size": batches * shape.batch_size,
        "train.log_every": every,
        "train.eval_every": args.steps,
        "train.eval_stories": 1,
        "train.save_every": args.steps,
    }
    if (micro_batch := TrainArgs().per_device_batch_size) is not None:  # no rule chooses it
        flags["train.per_device_batch_size"] = min(micro_batch, shape.batch_size)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    finished = run_process(
        [
            sys.executable,
            *(launch if processes > 1 else []),
            "scripts/train.py",
            *data,
            *shape.flags(family),
            *(f"--{flag}={value}" for flag, value in flags.items()),
            *args.flags,
        ],
        env={"PYTHONPATH": str(ROOT), **(env or {})},
    )
    speeds = [line["train/tokens_per_second"] for line in _logged(run_dir)]
    return Measured(_steady(speeds), finished.peak_bytes)


def _logged(run_dir: Path) -> list[dict]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/tokens_per_second" in line]


def _gpt2(shape: Shape, prepared: Path, steps: int, *, compiled: bool) -> Measured:
    precision = resolve_precision("auto", torch.device("cpu"))  # bf16 only where it is not emulated
    settings = {
        "tokens": prepared / "train.bin",
        "vocab_size": shape.vocab_size,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "seq_len": shape.seq_len,
        "batch_size": shape.batch_size,
        "steps": steps,
        "precision": precision,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()] + ["--compile"] * compiled
    return _peer(run_process([sys.executable, "benchmarks/gpt2_accelerate.py", *flags]), shape)


def _nanogpt(shape: Shape, checkout: Path, dataset: Path, steps: int, scratch: Path) -> Measured:
    settings = {
        "out_dir": scratch / "nanogpt_out",
        "batch_size": shape.batch_size,
        "block_size": shape.seq_len,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.hidden,
        "max_iters": steps - 1,
        "eval_interval": 10**6,
    }
    return _peer(nanogpt.train(checkout, dataset, settings), shape)


def _peer(finished: Finished, shape: Shape) -> Measured:
    speeds = [shape.tokens_per_step / one.step_seconds for one in nanogpt.iterations(finished)]
    return Measured(_steady(speeds), finished.peak_bytes)


def _steady(speeds: Sequence[float]) -> float:
    """The median without the first third: what is compiled, allocated and cached then is paid once."""
    return statistics.median(speeds[len(speeds) // 3 :])


def _ratios(rows: dict[str, dict]) -> dict[str, dict[str, Spread]]:
    """Ours over each peer, round by round: speed (above 1 is better) and memory (below 1 is better).

    Of GPT2LMHeadModel the faster of its two settings counts.
    """
    gpt2 = [name for name in rows if name.startswith(GPT2)]
    peers = [max(gpt2, key=lambda name: rows[name]["tokens_per_second"].median)]
    peers += [NANOGPT] * (NANOGPT in rows)
    return {
        f"{ours} / {peer}": {
            "speed": rows[ours]["tokens_per_second"].over(rows[peer]["tokens_per_second"]),
            "memory": rows[ours]["peak_bytes"].over(rows[peer]["peak_bytes"]),
        }
        for peer in peers
        for ours in rows
        if ours.startswith("ours")
    }


def _table(result: dict) -> str:
    ratios = result["ratios"]
    peers = list(dict.fromkeys(pair.split(" / ")[1] for pair in ratios))
    rows = []
    for contender, row in result["contenders"].items():
        against = [ratios.get(f"{contender} / {peer}") for peer in peers]
        rows.append(
            [
                contender,
                row["tokens_per_second"].text(),
                f"{row['utilisation']:.1%}",
                f"{row['peak_bytes'].median / 1e6:,.0f}",
                *(r["speed"].text("{:.2f}") if r else "" for r in against),
                *(f"{r['memory'].median:.2f}" if r else "" for r in against),
            ]
        )
    head = ["training", "tokens/s", "of the matmul rate", "peak MB"]
    head += [f"speed / {peer}" for peer in peers] + [f"memory / {peer}" for peer in peers]
    return markdown_table(head, rows)


def scale(args: argparse.Namespace, scratch: Path) -> None:
    """Weak scaling: two processes, each with a thread and a batch, beside one, and one with two threads."""
    name = args.shapes[0]
    shape = SHAPES[name]
    data = write_random_tokens(scratch / "data", vocab_size=shape.vocab_size, num_tokens=2**20)
    ours = partial(_ours, shape, data, args, scratch, count(), "gpt")
    one_thread, two_threads = {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}
    contenders = {
        "1 process, 1 thread": partial(ours, env=one_thread),
        "2 processes, 1 thread each": partial(ours, env=one_thread, processes=2, batches=2),
        "1 process, 2 threads": partial(ours, env=two_threads, batches=2),
    }
    outcomes = interleaved(contenders, args.rounds)
    speeds = {c: Spread.of([run.tokens_per_second for run in runs]) for c, runs in outcomes.items()}
    single, double, threads = speeds.values()
    efficiency = Spread.of([ratio / 2 for ratio in double.over(single).values])
    result = {
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "shape": name,
        "tokens_per_step": {
            "1 process, 1 thread": shape.tokens_per_step,
            "others": 2 * shape.tokens_per_step,
        },
        "tokens_per_second": speeds,
        "efficiency": efficiency,
        "over_threads": double.over(threads),
    }
    table = markdown_table(
        ["training, family gpt", "tokens a step", "tokens/s"],
        [
            [contender, f"{(1 if speed is single else 2) * shape.tokens_per_step:,}", speed.text()]
            for contender, speed in speeds.items()
        ],
    )
    table += (
        f"\nWeak-scaling efficiency of two processes: {efficiency.text('{:.0%}')}; two processes over two "
        f"threads: {result['over_threads'].text('{:.2f}')}.\n"
    )
    print(table)
    if not args.quick:
        write_result("train_processes", result)
        fill_table(PAGE, "benchmarks/train.py --processes 2", table)


def profile(args: argparse.Namespace, scratch: Path) -> None:
    """The step from inside, on one device; see step_profile.py. Not yet run on a GPU."""
    rows = profile_shapes(
        {name: SHAPES[name] for name in args.shapes},
        scratch,
        device=args.device,
        seconds=60 * args.minutes,
        compiled=(False,) if args.quick else (True, False),
        flags=args.flags,
    )
    result = {
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    table = markdown_table(
        [
            "shape",
            "step",
            "windows at once",
            "tokens/s",
            "utilisation",
            "device busy",
            "input",
            "synchronisations a step",
            "peak MB",
        ],
        [
            [
                row.shape,
                "compiled" if row.compiled else "eager",
                row.micro_batch,
                *([row.problem, "", "", "", "", ""] if row.problem else row.cells()),
            ]
            for row in rows
        ],
    )
    print(table)
    if not args.quick:
        write_result(f"train_{args.device}" if args.device == "cuda" else "train_profile", result)
        if args.device == "cuda":
            fill_table(PAGE, "benchmarks/train.py --device cuda", table)


def draw(shapes: dict[str, dict], path: Path) -> None:
    """Bars of tokens per second with their spread, a panel for each shape."""
    figure = Figure(figsize=(8, 1.0 + 1.9 * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shapes), squeeze=False)[:, 0]
    for axes, (name, result) in zip(panels, shapes.items(), strict=True):
        contenders = sorted(
            result["contenders"].items(), key=lambda item: item[1]["tokens_per_second"]["median"]
        )
        for row, (contender, measured) in enumerate(contenders):
            speed = measured["tokens_per_second"]
            spread = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
            colour = "tab:orange" if contender.startswith("ours") else "tab:gray"
            axes.barh(row, speed["median"], xerr=spread, color=colour, height=0.7, ecolor="black", capsize=3)
            axes.annotate(
                f"{speed['median']:,.0f}",
                (speed["max"], row),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(contenders)), [contender for contender, _ in contenders])
        axes.set_title(
            f"{name}, {result['shape']['tokens_per_step']:,} tokens a step", loc="left", fontsize=10
        )
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("training tokens per second")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

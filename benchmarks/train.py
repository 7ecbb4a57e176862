"""Compare training speed and memory: ours, nanoGPT and GPT2LMHeadModel, interleaved.

    python benchmarks/train.py --nanogpt PATH            # a checkout of github.com/karpathy/nanoGPT
    python benchmarks/train.py --processes 2             # weak scaling: two CPU processes and one
    python benchmarks/train.py --device cuda             # a GPU: no input, no peer, under 8 minutes

Every contender is a separate process. All train on the same random token ids (random_tokens.py) with the same
number of tokens per step; data are prepared before. Ours is scripts/train.py with its defaults, measured from
its metrics.jsonl; arguments after `--` are added to its flags. Writes benchmarks/results/train.json (or
train_processes.json, train_cuda.json), docs/train_speed.png and the tables of docs/speed.md. `--quick` runs
everything on a tiny model in a minute and writes nothing.
"""

import argparse
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
from harness import (
    ONLY_TRAINING,
    ROOT,
    ProcessResult,
    Stats,
    bar_chart,
    fill_table,
    git_revision,
    markdown_table,
    provenance,
    read_result,
    run_interleaved,
    run_process,
    run_train,
    write_result,
)
from random_tokens import write_random_tokens
from step_profile import OUT_OF_TIME, profile_shapes

from tinystories_slm.config import parse_config
from tinystories_slm.config.flags import to_flags
from tinystories_slm.hardware.peak import peak_flops
from tinystories_slm.model_costs import flops_per_token
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training.precision import resolve_precision

PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "train_speed.png"
NANOGPT, GPT2 = "nanoGPT as shipped", "GPT2LMHeadModel"


@dataclass(frozen=True)
class Shape:
    """Shape of a model and of its optimizer step."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    seq_len: int
    batch_size: int
    """Sequences per step, of `seq_len` tokens each."""
    micro_batches: tuple[int, ...]
    """Sequences per forward pass, measured one after the other on a GPU."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def flags(self, family: str) -> list[str]:
        """Flags of our train.py; `llama` has QK-norm, as the presets of that family."""
        options = {
            "data.seq_len": self.seq_len,
            "model.family": family,
            "model.num_hidden_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": self.heads,
        }
        return to_flags(options | ({"model.qk_norm": True} if family == "llama" else {}))

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
class Measurement:
    """Speed and memory of one training process."""

    tokens_per_second: float
    """Median over its steps, or intervals of steps, without the first third."""
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; omit to skip it")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 9m 30m; on cuda also 124m")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contender")
    parser.add_argument("--steps", type=int, default=18, help="of each run; the first third is warm-up")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="2: weak scaling")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", action="store_true", help="profile a step, as on cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="no profile starts later than this")
    parser.add_argument("--quick", action="store_true", help="tiny model, one round; writes nothing")
    parser.add_argument("flags", nargs="*", help="after --: more flags of our train.py")
    args = parser.parse_args(argv)
    is_profile = args.profile or args.device == "cuda"
    if args.quick:
        args.shapes, args.rounds, args.steps = ["tiny"], 1, min(args.steps, 6)
    args.shapes = args.shapes or ["9m", "30m", *(["124m"] if is_profile else [])]
    with tempfile.TemporaryDirectory() as scratch:
        if is_profile:
            profile(args, Path(scratch))
        elif args.processes > 1:
            measure_scaling(args, Path(scratch))
        else:
            for name in args.shapes:
                compare(args, name, Path(scratch))


def compare(args: argparse.Namespace, name: str, scratch: Path) -> None:
    """Measure ours and the peers at one shape, and record the result."""
    shape = SHAPES[name]
    prepared = scratch / f"data_{name}"
    data = write_random_tokens(prepared, vocab_size=shape.vocab_size, num_tokens=2**20)
    ours = partial(_train_ours, shape, data, args, scratch, count())
    contenders: dict[str, Callable[[], Measurement]] = {
        "ours, gpt2": partial(ours, "gpt2"),
        "ours, llama": partial(ours, "llama"),
        f"{GPT2}, eager": partial(_train_gpt2, shape, prepared, args.steps, compiled=False),
        f"{GPT2}, compiled": partial(_train_gpt2, shape, prepared, args.steps, compiled=True),
    }
    if args.quick:
        del contenders[f"{GPT2}, compiled"]
    if args.nanogpt:
        dataset = nanogpt.write_data(prepared, scratch / f"nanogpt_{name}")
        contenders[NANOGPT] = partial(_train_nanogpt, shape, args.nanogpt, dataset, args.steps, scratch)
    peaks: list[float] = []

    def measure_matmul_rate() -> None:
        device = torch.device("cpu")
        peaks.append(peak_flops(device, resolve_precision("auto", device)).flops_per_second)

    outcomes = run_interleaved({"matmul rate": measure_matmul_rate, **contenders}, args.rounds)
    rows = {}
    for contender in contenders:
        runs = outcomes[contender]
        speed = Stats.of([run.tokens_per_second for run in runs])
        family = "llama" if contender == "ours, llama" else "gpt2"
        rows[contender] = {
            "tokens_per_second": speed,
            "peak_bytes": Stats.of([run.peak_bytes for run in runs]),
            "mfu": round(speed.median * shape.flops_per_token(family) / max(peaks), 4),
        }
    result = {
        **provenance(),
        "nanogpt": git_revision(args.nanogpt) if args.nanogpt else None,
        "shape": asdict(shape) | {"tokens_per_step": shape.tokens_per_step},
        "steps": args.steps,
        "rounds": args.rounds,
        "matmul_flops_per_second": Stats.of(peaks),
        "contenders": rows,
        "ratios": _ratios(rows),
    }
    table = _format_table(result)
    print(f"\n{name}: {shape.tokens_per_step:,} tokens per step\n{table}")
    if not args.quick:
        write_result("train", read_result("train") | {name: result})
        fill_table(PAGE, f"benchmarks/train.py, {name}", table)
        draw(read_result("train"), PICTURE)


def _train_ours(
    shape: Shape,
    data: Sequence[str],
    args: argparse.Namespace,
    scratch: Path,
    run_numbers: "count[int]",
    family: str,
    *,
    processes: int = 1,
    batches: int = 1,
    env: dict[str, str] | None = None,
) -> Measurement:
    """Run scripts/train.py with a user's defaults; a step has `batches` times the shape's sequences."""
    run_dir = scratch / f"run_{next(run_numbers)}"
    options = {
        **ONLY_TRAINING,
        "output_dir": run_dir,
        "train.max_steps": args.steps,
        "train.warmup_steps": 1,
        "train.batch_size": batches * shape.batch_size,
        "train.log_every": max(1, args.steps // 6),
    }
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    done = run_train(
        [*data, *shape.flags(family), *to_flags(options), *args.flags],
        launcher=launcher if processes > 1 else (),
        env=env,
    )
    key = "train/tokens_per_second"
    speeds = [line[key] for line in read_metrics(run_dir / "metrics.jsonl") if key in line]
    return Measurement(_steady_speed(speeds), done.peak_bytes)


def _train_gpt2(shape: Shape, prepared: Path, steps: int, *, compiled: bool) -> Measurement:
    options = {
        "tokens": prepared / "train.bin",
        "vocab_size": shape.vocab_size,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "seq_len": shape.seq_len,
        "batch_size": shape.batch_size,
        "steps": steps,
        "precision": resolve_precision("auto", torch.device("cpu")),  # bf16 only if it is not emulated
    }
    flags = to_flags(options) + ["--compile"] * compiled
    return _measure_peer(run_process([sys.executable, "benchmarks/gpt2_accelerate.py", *flags]), shape)


def _train_nanogpt(shape: Shape, checkout: Path, dataset: Path, steps: int, scratch: Path) -> Measurement:
    options = {
        "out_dir": scratch / "nanogpt_out",
        "batch_size": shape.batch_size,
        "block_size": shape.seq_len,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.hidden,
        "max_iters": steps - 1,
        "eval_interval": 10**6,
    }
    return _measure_peer(nanogpt.train(checkout, dataset, options), shape)


def _measure_peer(done: ProcessResult, shape: Shape) -> Measurement:
    speeds = [shape.tokens_per_step / one.step_seconds for one in nanogpt.read_iterations(done)]
    return Measurement(_steady_speed(speeds), done.peak_bytes)


def _steady_speed(speeds: Sequence[float]) -> float:
    """Median without the first third, which pays once for compilation, allocation and caches."""
    return statistics.median(speeds[len(speeds) // 3 :])


def _ratios(rows: dict[str, dict]) -> dict[str, dict[str, Stats]]:
    """Ratios of ours to each peer, round by round: speed (above 1 is better) and memory (below 1 is better).

    For GPT2LMHeadModel, the faster of eager and compiled counts.
    """
    gpt2 = [name for name in rows if name.startswith(GPT2)]
    peers = [max(gpt2, key=lambda name: rows[name]["tokens_per_second"].median)]
    peers += [NANOGPT] * (NANOGPT in rows)
    return {
        f"{ours} / {peer}": {
            "speed": rows[ours]["tokens_per_second"].ratio_to(rows[peer]["tokens_per_second"]),
            "memory": rows[ours]["peak_bytes"].ratio_to(rows[peer]["peak_bytes"]),
        }
        for peer in peers
        for ours in rows
        if ours.startswith("ours")
    }


def _format_table(result: dict) -> str:
    ratios = result["ratios"]
    peers = list(dict.fromkeys(pair.split(" / ")[1] for pair in ratios))
    rows = []
    for contender, row in result["contenders"].items():
        against = [ratios.get(f"{contender} / {peer}") for peer in peers]
        rows.append(
            [
                contender,
                row["tokens_per_second"].text(),
                f"{row['mfu']:.1%}",
                f"{row['peak_bytes'].median / 1e6:,.0f}",
                *(r["speed"].text("{:.2f}") if r else "" for r in against),
                *(f"{r['memory'].median:.2f}" if r else "" for r in against),
            ]
        )
    head = ["training", "tokens/s", "of the matmul rate", "peak MB"]
    head += [f"speed / {peer}" for peer in peers] + [f"memory / {peer}" for peer in peers]
    return markdown_table(head, rows)


def measure_scaling(args: argparse.Namespace, scratch: Path) -> None:
    """Measure weak scaling: two processes with a thread and a batch each, one process, two threads."""
    name = args.shapes[0]
    shape = SHAPES[name]
    data = write_random_tokens(scratch / "data", vocab_size=shape.vocab_size, num_tokens=2**20)
    ours = partial(_train_ours, shape, data, args, scratch, count(), "gpt2")
    one_thread, two_threads = {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}
    contenders = {
        "1 process, 1 thread": partial(ours, env=one_thread),
        "2 processes, 1 thread each": partial(ours, env=one_thread, processes=2, batches=2),
        "1 process, 2 threads": partial(ours, env=two_threads, batches=2),
    }
    outcomes = run_interleaved(contenders, args.rounds)
    speeds = {c: Stats.of([run.tokens_per_second for run in runs]) for c, runs in outcomes.items()}
    single, double, threads = speeds.values()
    efficiency = Stats.of([ratio / 2 for ratio in double.ratio_to(single).values])
    over_threads = double.ratio_to(threads)
    result = {
        **provenance(),
        "shape": name,
        "tokens_per_step": {
            "1 process, 1 thread": shape.tokens_per_step,
            "others": 2 * shape.tokens_per_step,
        },
        "tokens_per_second": speeds,
        "efficiency": efficiency,
        "over_threads": over_threads,
    }
    table = markdown_table(
        ["training, family gpt2", "tokens per step", "tokens/s"],
        [
            [contender, f"{(1 if speed is single else 2) * shape.tokens_per_step:,}", speed.text()]
            for contender, speed in speeds.items()
        ],
    )
    table += (
        f"\nWeak-scaling efficiency of two processes: {efficiency.text('{:.0%}')}; two processes over two "
        f"threads: {over_threads.text('{:.2f}')}.\n"
    )
    print(table)
    if not args.quick:
        write_result("train_processes", result)
        fill_table(PAGE, "benchmarks/train.py --processes 2", table)


def profile(args: argparse.Namespace, scratch: Path) -> None:
    """Profile the step on one device (step_profile.py); the table omits what there was no time for."""
    rows = profile_shapes(
        {name: SHAPES[name] for name in args.shapes},
        scratch,
        device=args.device,
        seconds=60 * args.minutes,
        compiled=(False,) if args.quick else (True, False),
        flags=args.flags,
    )
    head = ["shape", "step", "micro-batch", "tokens/s", "MFU", "device busy", "input"]
    head += ["synchronizations per step", "peak MB"]
    table = markdown_table(
        head,
        [
            [row.shape, "compiled" if row.compiled else "eager", row.micro_batch, *row.cells()]
            for row in rows
            if row.problem != OUT_OF_TIME
        ],
    )
    print(table)
    if not args.quick:
        result = {**provenance(), "rows": [asdict(row) for row in rows]}
        write_result(f"train_{args.device}" if args.device == "cuda" else "train_profile", result)
        if args.device == "cuda":
            fill_table(PAGE, "benchmarks/train.py --device cuda", table)


def draw(shapes: dict[str, dict], path: Path) -> None:
    """Chart the tokens per second of results/train.json, fastest first, one panel per shape."""
    panels = {}
    for name, result in shapes.items():
        bars = {c: Stats(**row["tokens_per_second"]) for c, row in result["contenders"].items()}
        title = f"{name}, {result['shape']['tokens_per_step']:,} tokens per step"
        panels[title] = dict(sorted(bars.items(), key=lambda bar: -bar[1].median))
    bar_chart(path, panels, xlabel="training tokens per second (median and range of the rounds)")


if __name__ == "__main__":
    main()

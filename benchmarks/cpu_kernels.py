"""Compare the CPU kernels by compiler and instruction set: training and decoding at the 9M shape, one thread.

    python benchmarks/cpu_kernels.py

Every contender is a separate process with its own `CC`: gcc and clang, as far as they are installed, for the
x86-64 levels v2 (SSE4), v3 (AVX2, FMA) and v4 (AVX-512), and for this CPU (native). Levels that the CPU lacks
are omitted. "PyTorch" runs without kernels. Writes benchmarks/results/cpu_kernels.json and the table of
docs/speed.md; `--quick` measures one contender briefly and writes nothing.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from generate import CONTEXT, GREEDY, HEADS, HIDDEN, LAYERS, PROMPT_LENGTH, VOCAB
from harness import (
    ONLY_TRAINING,
    ROOT,
    Stats,
    fill_table,
    markdown_table,
    provenance,
    run_interleaved,
    run_process,
    write_result,
)
from random_tokens import write_random_tokens

from tinystories_slm.config import parse_config
from tinystories_slm.config.flags import to_flags
from tinystories_slm.generation.slot_batch import decode
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM
from tinystories_slm.training.loop import train_step
from tinystories_slm.training.run import start_run

# Instructions beyond the level before, by torch's names.
LEVELS = {
    "x86-64-v2": ("sse4_2",),
    "x86-64-v3": ("avx2", "bmi2", "fma3"),
    "x86-64-v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
}
COLUMNS = {
    "train_float32": "training, float32",
    "decode_float32": "one story, float32",
    "decode_bfloat16": "one story, bfloat16",
}
PYTORCH = "PyTorch, no kernels"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of the story")
    parser.add_argument("--steps", type=int, default=4, help="measured training steps of 1,024 tokens")
    parser.add_argument("--quick", action="store_true", help="one contender, few tokens; writes nothing")
    parser.add_argument("--measure", choices=("kernels", "torch"), help="measure in this process")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.tokens, args.steps = 1, 4, 1
    if args.measure:
        print(json.dumps(measure(args.measure == "kernels", args.tokens, args.steps)))
        return
    commands = compiler_commands()
    if args.quick:
        commands = commands[-1:]
    contenders = {command: partial(_run, command, args) for command in [*commands, PYTORCH]}
    outcomes = run_interleaved(contenders, args.rounds)
    speeds = {
        name: {column: Stats.of([run[column] for run in runs]) for column in COLUMNS}
        for name, runs in outcomes.items()
    }
    table = _format_table(speeds)
    print(table)
    if not args.quick:
        result = {**provenance(), "tokens": args.tokens, "steps": args.steps, "rounds": args.rounds}
        write_result("cpu_kernels", result | {"tokens_per_second": speeds})
        fill_table(ROOT / "docs" / "speed.md", "python benchmarks/cpu_kernels.py", table)


def compiler_commands() -> list[str]:
    """Values of `CC`: every installed compiler at every level that this CPU has."""
    levels = ["native"]
    if platform.machine() in ("x86_64", "AMD64"):
        found = (
            torch.cpu.get_capabilities()
        )  # a name that torch does not know is an error, not a missing level
        levels = [level for level, needed in LEVELS.items() if all(found[name] for name in needed)] + levels
    compilers = [compiler for compiler in ("gcc", "clang") if shutil.which(compiler)]
    return [f"{compiler} -march={level}" for compiler in compilers for level in levels]


def _run(command: str, args: argparse.Namespace) -> dict[str, float]:
    kind = "torch" if command == PYTORCH else "kernels"
    flags = to_flags({"measure": kind, "tokens": args.tokens, "steps": args.steps})
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if kind == "kernels":
        env["CC"] = command
    return json.loads(
        run_process([sys.executable, "benchmarks/cpu_kernels.py", *flags], env=env).lines[-1].text
    )


def measure(with_kernels: bool, num_tokens: int, num_steps: int) -> dict[str, float]:
    """Tokens per second of this process, by column."""
    with tempfile.TemporaryDirectory() as scratch:
        speeds = {"train_float32": _train(with_kernels, num_steps, Path(scratch))}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"decode_{str(dtype).removeprefix('torch.')}"
        speeds[name] = _decode(with_kernels, dtype, num_tokens)
    return speeds


def _train(with_kernels: bool, num_steps: int, scratch: Path) -> float:
    options = {
        **ONLY_TRAINING,
        "output_dir": scratch / "run",
        "data.seq_len": CONTEXT,
        "model.num_hidden_layers": LAYERS,
        "model.hidden_size": HIDDEN,
        "model.num_attention_heads": HEADS,
        "train.batch_size": 4,
        "train.mixed_precision": "no",
        "train.cpu_kernels": "fused" if with_kernels else "torch",
    }
    data = write_random_tokens(scratch / "data", vocab_size=VOCAB, num_tokens=2**16)
    with closing(start_run(parse_config([*data, *to_flags(options)]))) as run:
        train_step(run)
        started_s = time.perf_counter()
        for _ in range(num_steps):
            train_step(run)
        return num_steps * run.tokens_per_step / (time.perf_counter() - started_s)


def _decode(with_kernels: bool, dtype: torch.dtype, num_tokens: int) -> float:
    torch.manual_seed(0)
    config = TinyStoriesConfig(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, block_size=CONTEXT
    )
    model = TinyStoriesForCausalLM(config).eval().to(dtype)
    ids = torch.randint(2, VOCAB, (1, PROMPT_LENGTH))
    loop = partial(
        decode,
        model,
        ids,
        seeds=[0],
        sampling=GREEDY,
        stop_ids=[],
        batch_size=1,
        backend="cpu" if with_kernels else "torch",
    )
    list(loop(new_token_limits=[2]))
    started_s = time.perf_counter()
    [(_, new_ids)] = loop(new_token_limits=[num_tokens])
    assert len(new_ids) == num_tokens
    return num_tokens / (time.perf_counter() - started_s)


def _format_table(speeds: dict[str, dict[str, Stats]]) -> str:
    rows = [
        [name, *(f"{row[c].text()}, {row[c].ratio_to(speeds[PYTORCH][c]).median:.2f}" for c in COLUMNS)]
        for name, row in speeds.items()
    ]
    return markdown_table(["kernels", *(f"{title}: tokens/s, ratio" for title in COLUMNS.values())], rows)


if __name__ == "__main__":
    main()

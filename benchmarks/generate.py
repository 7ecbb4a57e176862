"""How fast stories are told: ours beside GPT2LMHeadModel.generate and llama2.c, in turns.

    python benchmarks/generate.py --llama2c PATH      # a checkout of github.com/karpathy/llama2.c

The shape is that of configs/9m.yaml: 8 layers x 256, 8 heads, vocabulary 10,000, context 256. All tell from
random weights and greedily, but for one row, and no story ends early. llama2.c is built by its own
`make runomp` in a scratch folder, and times itself; without --llama2c its row is left out. Writes
benchmarks/results/generate.json, docs/generate_speed.png and the table of docs/generation.md. `--quick` tries
all of it out in seconds, and writes nothing.
"""

import argparse
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import (
    ROOT,
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
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tinystories_slm import TinyStoriesConfig, TinyStoriesForCausalLM
from tinystories_slm.generation import Sampling
from tinystories_slm.generation.decoding import choose_decoding, decode

PAGE = ROOT / "docs" / "generation.md"
PICTURE = ROOT / "docs" / "generate_speed.png"
LAYERS, HIDDEN, HEADS, VOCAB, CONTEXT = 8, 256, 8, 10_000, 256
PROMPT_LENGTH = 4
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling()
GPT2_ONE, GPT2_MANY = "GPT2LMHeadModel.generate, 1 story", "GPT2LMHeadModel.generate, 32 stories"
LLAMA2C = "llama2.c, OpenMP, 1 story"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama2c", type=Path, help="a checkout of llama2.c")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a few tokens of few stories, nothing written")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()  # GPT-2's own end token is not in this vocabulary
    num_tokens, many = (8, 4) if args.quick else (200, 256)

    contenders = _contenders(many)
    if args.llama2c is None:
        print("llama2.c is left out; name a checkout with --llama2c PATH")
        speeds = _measured(contenders, args.rounds, num_tokens)
    else:
        with _llama2c(args.llama2c) as llama2c:
            speeds = _measured(contenders | {LLAMA2C: llama2c}, args.rounds, num_tokens)
    ratios = _ratios(speeds)
    table = _table(speeds, ratios)
    print(table)
    if args.quick:
        return
    result = {
        "command": command(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "shape": {
            "layers": LAYERS,
            "hidden": HIDDEN,
            "heads": HEADS,
            "vocabulary": VOCAB,
            "context": CONTEXT,
        },
        "new_tokens_per_story": num_tokens,
        "rounds": args.rounds,
        "tokens_per_second": speeds,
        "ratios": ratios,
    }
    write_result("generate", result)
    fill_table(PAGE, "python benchmarks/generate.py", table)
    _plot(speeds, PICTURE)


def _measured(
    contenders: dict[str, Callable[[int], float]], rounds: int, num_tokens: int
) -> dict[str, Spread]:
    """Tokens per second of each, after a few that do not count."""
    for tell in contenders.values():
        tell(4)
    contenders = {name: partial(tell, num_tokens) for name, tell in contenders.items()}
    return {name: Spread.of(speeds) for name, speeds in interleaved(contenders, rounds).items()}


def _contenders(many: int) -> dict[str, Callable[[int], float]]:
    """By what they are, functions that tell stories of so many new tokens and return tokens per second."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=CONTEXT)).eval()
    gpt = TinyStoriesForCausalLM(TinyStoriesConfig(**sizes, block_size=CONTEXT)).eval()
    modern = TinyStoriesForCausalLM(TinyStoriesConfig(**sizes, block_size=CONTEXT, family="modern")).eval()
    rounded = {
        name: type(model)(model.config).eval().to(torch.bfloat16)
        for name, model in (("theirs", theirs), ("gpt", gpt))
    }

    def plain(model: PreTrainedModel, stories: int, num_tokens: int) -> float:
        ids = torch.randint(2, VOCAB, (stories, PROMPT_LENGTH))
        started_s = time.perf_counter()
        told = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert told.shape == (stories, PROMPT_LENGTH + num_tokens)
        return stories * num_tokens / (time.perf_counter() - started_s)

    def ours(model: PreTrainedModel, stories: int, sampling: Sampling, num_tokens: int) -> float:
        ids = torch.randint(2, VOCAB, (1, PROMPT_LENGTH)).expand(stories, -1)
        started_s = time.perf_counter()
        loop = partial(
            decode,
            seeds=range(stories),
            budgets=[num_tokens] * stories,
            sampling=sampling,
            end_ids=[],
            batch_size=stories,
            way=choose_decoding(model)[0],
        )
        ended = model.generate(ids, custom_generate=loop, max_new_tokens=num_tokens)
        assert sum(len(new_ids) for _, new_ids in ended) == stories * num_tokens
        return stories * num_tokens / (time.perf_counter() - started_s)

    return {
        GPT2_ONE: partial(plain, theirs, 1),
        "ours, gpt, 1 story, transformers' loop": partial(plain, gpt, 1),
        "ours, gpt, 1 story": partial(ours, gpt, 1, GREEDY),
        "ours, modern, 1 story": partial(ours, modern, 1, GREEDY),
        "ours, gpt, bfloat16, 1 story": partial(ours, rounded["gpt"], 1, GREEDY),
        GPT2_MANY: partial(plain, theirs, min(many, 32)),
        "GPT2LMHeadModel.generate, bfloat16, 32 stories": partial(plain, rounded["theirs"], min(many, 32)),
        f"ours, gpt, {many} stories": partial(ours, gpt, many, GREEDY),
        f"ours, gpt, bfloat16, {many} stories": partial(ours, rounded["gpt"], many, GREEDY),
        f"ours, gpt, bfloat16, {many} stories, sampled": partial(ours, rounded["gpt"], many, SAMPLED),
    }


@contextmanager
def _llama2c(checkout: Path) -> Iterator[Callable[[int], float]]:
    """llama2.c, built apart from its checkout, with random weights of the modern family's shape."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("Makefile", "run.c", "runq.c"):
            shutil.copy(checkout / name, scratch)
        subprocess.run(["make", "runomp"], cwd=scratch, check=True, capture_output=True)
        weights, vocabulary = Path(scratch) / "random.bin", Path(scratch) / "vocabulary.bin"
        _write_llama2c_weights(weights)
        _write_llama2c_vocabulary(vocabulary)
        arguments = [Path(scratch) / "run", weights, "-z", vocabulary, "-t", "0"]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}

        def tell(num_tokens: int) -> float:
            steps = str(PROMPT_LENGTH + num_tokens)
            text = run_process([*arguments, "-n", steps], cwd=Path(scratch), env=threads).text
            return float(re.search(r"achieved tok/s: ([0-9.]+)", text)[1])

        yield tell


def _write_llama2c_weights(path: Path) -> None:
    """Its first file format: seven sizes, then the matrices by kind, each kind for all layers."""
    config = TinyStoriesConfig(hidden_size=HIDDEN, family="modern")
    inner, head_dim = config.intermediate_size, HIDDEN // HEADS
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    embedding[1] = 0.0  # its token that ends a text is then never the likeliest
    square = (LAYERS, HIDDEN, HIDDEN)
    with path.open("wb") as file:
        file.write(struct.pack("7i", HIDDEN, inner, LAYERS, HEADS, HEADS, VOCAB, CONTEXT))
        file.write((0.02 * embedding).numpy().tobytes())
        tables = (CONTEXT, head_dim // 2)  # of angles, which it reads over
        for shape in (
            *((LAYERS, HIDDEN), square, square, square, square, (LAYERS, HIDDEN)),
            *((LAYERS, inner, HIDDEN), (LAYERS, HIDDEN, inner), (LAYERS, inner, HIDDEN), (HIDDEN,)),
            *(tables, tables),
        ):
            file.write((0.02 * torch.randn(shape, generator=generator)).numpy().tobytes())


def _write_llama2c_vocabulary(path: Path) -> None:
    """A word for each token, no two the same."""
    with path.open("wb") as file:
        words = [f"<{number}>".encode() for number in range(VOCAB)]
        file.write(struct.pack("i", max(map(len, words))))
        for word in words:
            file.write(struct.pack("fi", 0.0, len(word)) + word)


def _ratios(speeds: dict[str, Spread]) -> dict[str, Spread]:
    """Ours over each peer at what it is measured by: one story beside one, many beside GPT-2's 32."""
    ratios = {}
    for name, speed in speeds.items():
        if not name.startswith("ours"):
            continue
        one = name.split(", transformers'")[0].endswith("1 story")
        for peer in (GPT2_ONE, LLAMA2C) if one else (GPT2_MANY,):
            if peer in speeds:
                ratios[f"{name} / {peer}"] = speed.over(speeds[peer])
    return ratios


def _table(speeds: dict[str, Spread], ratios: dict[str, Spread]) -> str:
    rows = []
    for name, speed in speeds.items():
        cells = []
        for peers in ((GPT2_ONE, GPT2_MANY), (LLAMA2C,)):
            found = [ratios[f"{name} / {peer}"] for peer in peers if f"{name} / {peer}" in ratios]
            cells.append(found[0].text("{:.2f}") if found else "")
        rows.append([name, speed.text(), *cells])
    return markdown_table(["", "tokens/s", "times GPT2LMHeadModel", "times llama2.c"], rows)


def _plot(speeds: dict[str, Spread], path: Path) -> None:
    figure = Figure(figsize=(8, 0.4 * len(speeds) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(speeds)[::-1]
    for at, name in enumerate(names):
        speed = speeds[name]
        around = [[speed.median - speed.min], [speed.max - speed.median]]
        color = "tab:blue" if name.startswith("ours") else "tab:gray"
        axes.barh(at, speed.median, xerr=around, color=color, ecolor="black", capsize=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlabel("tokens per second (median, and the range of all rounds)")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

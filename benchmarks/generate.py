"""Compare generation speed: ours, GPT2LMHeadModel.generate and llama2.c, interleaved.

    python benchmarks/generate.py --llama2c PATH      # a checkout of github.com/karpathy/llama2.c
    python benchmarks/generate.py --device cuda       # a GPU: against transformers' loop, static cache too

The shape is that of configs/9m.yaml: 8 layers x 256, 8 heads, vocabulary 10,000, context 256. All generate
from random weights; one row samples, all others are greedy; no text ends early. llama2.c is built by its own
`make runomp` in a scratch folder and measures its own time: `run` in float32, and `runq`, which multiplies
8-bit weights with 8-bit activations, in groups of 64. Without --llama2c these rows are omitted. Writes
benchmarks/results/generate.json, docs/generate_speed.png and the table of docs/generation.md; on a GPU
generate_cuda.json and its table. `--quick` runs everything in seconds and writes nothing.
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
from harness import (
    ROOT,
    Stats,
    bar_chart,
    fill_table,
    git_revision,
    markdown_table,
    provenance,
    run_interleaved,
    run_process,
    write_result,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tinystories_slm.generation import SamplingParams
from tinystories_slm.generation.decoder import resolve_backend
from tinystories_slm.generation.slot_batch import decode
from tinystories_slm.int8_weights import int8_rows, round_to_int8
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM

PAGE = ROOT / "docs" / "generation.md"
PICTURE = ROOT / "docs" / "generate_speed.png"
LAYERS, HIDDEN, HEADS, VOCAB, CONTEXT = 8, 256, 8, 10_000, 256
PROMPT_LENGTH = 4
GROUP_SIZE = 64
"""Weights that share a scale in llama2.c; ours have a scale for each row."""
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams()
GPT2_ONE, GPT2_MANY = "GPT2LMHeadModel.generate, 1 story", "GPT2LMHeadModel.generate, 32 stories"
LLAMA2C = "llama2.c, OpenMP, 1 story"
LLAMA2C_INT8 = "llama2.c, OpenMP, int8, 1 story"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama2c", type=Path, help="checkout of llama2.c")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few tokens, few stories; writes nothing")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()  # GPT-2's own stop token is not in this vocabulary
    num_tokens, many = (8, 4) if args.quick else (200, 256)

    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no CUDA device")
    contenders = _build_gpu_contenders(many) if on_gpu else _build_contenders(many)
    if on_gpu:  # transformers compiles a static cache of each length anew
        speeds = _measure(contenders, args.rounds, num_tokens, warm_up_tokens=num_tokens)
    elif args.llama2c is None:
        print("llama2.c is omitted; use --llama2c PATH")
        speeds = _measure(contenders, args.rounds, num_tokens)
    else:
        with _llama2c_runners(args.llama2c) as llama2c:
            speeds = _measure(contenders | llama2c, args.rounds, num_tokens)
    ratios = _ratios(speeds)
    table = _format_table(speeds, ratios)
    print(table)
    if args.quick:
        return
    result = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "llama2c": git_revision(args.llama2c) if args.llama2c else None,
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
    write_result("generate_cuda" if on_gpu else "generate", result)
    fill_table(PAGE, f"python benchmarks/generate.py{' --device cuda' if on_gpu else ''}", table)
    if not on_gpu:
        draw(speeds, PICTURE)


def _measure(
    contenders: dict[str, Callable[[int], float]], rounds: int, num_tokens: int, *, warm_up_tokens: int = 4
) -> dict[str, Stats]:
    """Tokens per second of each contender, after a warm-up."""
    for generate in contenders.values():
        generate(warm_up_tokens)
    contenders = {name: partial(generate, num_tokens) for name, generate in contenders.items()}
    return {name: Stats.of(speeds) for name, speeds in run_interleaved(contenders, rounds).items()}


def _build_contenders(many: int) -> dict[str, Callable[[int], float]]:
    """Return functions that generate a number of new tokens per story and return tokens per second."""
    theirs, gpt2, llama = _build_models()
    bf16 = {
        name: type(model)(model.config).eval().to(torch.bfloat16)
        for name, model in (("theirs", theirs), ("gpt2", gpt2))
    }
    int8 = _build_models()[2]
    round_to_int8(int8)
    return {
        GPT2_ONE: partial(_transformers_loop, theirs, 1),
        "ours, gpt2, 1 story, transformers' loop": partial(_transformers_loop, gpt2, 1),
        "ours, gpt2, 1 story": partial(_ours, gpt2, 1, GREEDY),
        "ours, llama, 1 story": partial(_ours, llama, 1, GREEDY),
        "ours, gpt2, bfloat16, 1 story": partial(_ours, bf16["gpt2"], 1, GREEDY),
        "ours, llama, int8, 1 story": partial(_ours, int8, 1, GREEDY),
        GPT2_MANY: partial(_transformers_loop, theirs, min(many, 32)),
        "GPT2LMHeadModel.generate, bfloat16, 32 stories": partial(
            _transformers_loop, bf16["theirs"], min(many, 32)
        ),
        f"ours, gpt2, {many} stories": partial(_ours, gpt2, many, GREEDY),
        f"ours, gpt2, bfloat16, {many} stories": partial(_ours, bf16["gpt2"], many, GREEDY),
        f"ours, gpt2, bfloat16, {many} stories, sampled": partial(_ours, bf16["gpt2"], many, SAMPLED),
    }


def _build_gpu_contenders(many: int) -> dict[str, Callable[[int], float]]:
    """As `_build_contenders`, in bfloat16 on a GPU; a static cache is compiled by transformers."""
    theirs, gpt2, llama = (model.to("cuda", torch.bfloat16) for model in _build_models())
    static = {"cache_implementation": "static"}
    return {
        GPT2_ONE: partial(_transformers_loop, theirs, 1),
        "GPT2LMHeadModel.generate, static cache, 1 story": partial(_transformers_loop, theirs, 1, **static),
        "ours, gpt2, 1 story, transformers' loop": partial(_transformers_loop, gpt2, 1),
        "ours, gpt2, 1 story, transformers' loop, static cache": partial(
            _transformers_loop, gpt2, 1, **static
        ),
        "ours, gpt2, 1 story": partial(_ours, gpt2, 1, GREEDY),
        "ours, llama, 1 story": partial(_ours, llama, 1, GREEDY),
        GPT2_MANY: partial(_transformers_loop, theirs, min(many, 32)),
        f"GPT2LMHeadModel.generate, {many} stories": partial(_transformers_loop, theirs, many),
        f"ours, gpt2, {many} stories": partial(_ours, gpt2, many, GREEDY),
        f"ours, gpt2, {many} stories, sampled": partial(_ours, gpt2, many, SAMPLED),
    }


def _build_models() -> tuple[PreTrainedModel, TinyStoriesForCausalLM, TinyStoriesForCausalLM]:
    """GPT2LMHeadModel, and ours of both families, with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    return (
        GPT2LMHeadModel(GPT2Config(**sizes, n_positions=CONTEXT)).eval(),
        TinyStoriesForCausalLM(TinyStoriesConfig(**sizes, block_size=CONTEXT)).eval(),
        TinyStoriesForCausalLM(TinyStoriesConfig(**sizes, block_size=CONTEXT, family="llama")).eval(),
    )


def _transformers_loop(model: PreTrainedModel, stories: int, num_tokens: int, **options: object) -> float:
    ids = torch.randint(2, VOCAB, (stories, PROMPT_LENGTH), device=model.device)
    started_s = time.perf_counter()
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    generated = generated.tolist()  # waits for a GPU
    assert {len(row) for row in generated} == {PROMPT_LENGTH + num_tokens}
    return stories * num_tokens / (time.perf_counter() - started_s)


def _ours(model: PreTrainedModel, stories: int, sampling: SamplingParams, num_tokens: int) -> float:
    ids = torch.randint(2, VOCAB, (1, PROMPT_LENGTH)).expand(stories, -1).to(model.device)
    started_s = time.perf_counter()
    loop = partial(
        decode,
        seeds=range(stories),
        new_token_limits=[num_tokens] * stories,
        sampling=sampling,
        stop_ids=[],
        batch_size=stories,
        backend=resolve_backend(model)[0],
    )
    completions = model.generate(ids, custom_generate=loop, max_new_tokens=num_tokens)
    assert sum(len(new_ids) for _, new_ids in completions) == stories * num_tokens
    return stories * num_tokens / (time.perf_counter() - started_s)


@contextmanager
def _llama2c_runners(checkout: Path) -> Iterator[dict[str, Callable[[int], float]]]:
    """Functions that run llama2.c, built outside its checkout, with random weights in our llama shape."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in ("Makefile", "run.c", "runq.c"):
            shutil.copy(checkout / name, scratch)
        subprocess.run(["make", "runomp"], cwd=scratch, check=True, capture_output=True)
        _write_llama2c_weights(scratch / "run.bin")
        _write_llama2c_int8_weights(scratch / "runq.bin")
        _write_llama2c_vocabulary(scratch / "vocabulary.bin")
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}

        def generate(program: str, num_tokens: int) -> float:
            arguments = [scratch / program, scratch / f"{program}.bin", "-z", scratch / "vocabulary.bin"]
            steps = str(PROMPT_LENGTH + num_tokens)
            text = run_process([*arguments, "-t", "0", "-n", steps], cwd=scratch, env=threads).text
            return float(re.search(r"achieved tok/s: ([0-9.]+)", text)[1])

        yield {LLAMA2C: partial(generate, "run"), LLAMA2C_INT8: partial(generate, "runq")}


def _write_llama2c_weights(path: Path) -> None:
    """Write its first file format: seven sizes, then the matrices by kind, each kind for all layers."""
    embedding, generator = _random_embedding(), torch.Generator().manual_seed(1)
    norms = (LAYERS, HIDDEN)
    attention, [gate, down, up] = [(LAYERS, HIDDEN, HIDDEN)] * 4, _feed_forward_shapes()
    tables = (CONTEXT, HIDDEN // HEADS // 2)  # of angles, which it skips
    with path.open("wb") as file:
        file.write(struct.pack("7i", *_llama2c_sizes()))
        file.write(embedding.numpy().tobytes())
        for shape in (norms, *attention, norms, gate, down, up, (HIDDEN,), tables, tables):
            file.write((0.02 * torch.randn(shape, generator=generator)).numpy().tobytes())


def _write_llama2c_int8_weights(path: Path) -> None:
    """Write its second file format: a header, the norms, then integers and scales of each matrix."""
    generator = torch.Generator().manual_seed(1)
    shapes = [*[(LAYERS, HIDDEN, HIDDEN)] * 4, *_feed_forward_shapes()]
    with path.open("wb") as file:
        header = struct.pack("<Ii7iBi", 0x616B3432, 2, *_llama2c_sizes(), 1, GROUP_SIZE)
        file.write(header.ljust(256, b"\0"))
        file.write((0.02 * torch.randn((2 * LAYERS + 1) * HIDDEN, generator=generator)).numpy().tobytes())
        layers = (layer for shape in shapes for layer in torch.randn(shape, generator=generator))
        matrices = (0.02 * layer for layer in layers)
        for matrix in (_random_embedding(), *matrices):
            for part in int8_rows(matrix.reshape(-1, GROUP_SIZE)):
                file.write(part.numpy().tobytes())


def _llama2c_sizes() -> tuple[int, ...]:
    inner = TinyStoriesConfig(hidden_size=HIDDEN, family="llama").intermediate_size
    return HIDDEN, inner, LAYERS, HEADS, HEADS, VOCAB, CONTEXT


def _feed_forward_shapes() -> list[tuple[int, ...]]:
    inner = _llama2c_sizes()[1]
    return [(LAYERS, inner, HIDDEN), (LAYERS, HIDDEN, inner), (LAYERS, inner, HIDDEN)]


def _random_embedding() -> torch.Tensor:
    embedding = 0.02 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    embedding[1] = 0.0  # so that its stop token never has the highest logit
    return embedding


def _write_llama2c_vocabulary(path: Path) -> None:
    """Write a different word for each token."""
    with path.open("wb") as file:
        words = [f"<{number}>".encode() for number in range(VOCAB)]
        file.write(struct.pack("i", max(map(len, words))))
        for word in words:
            file.write(struct.pack("fi", 0.0, len(word)) + word)


def _ratios(speeds: dict[str, Stats]) -> dict[str, Stats]:
    """Ratios of ours to each peer: one story to one story, many stories to GPT-2's 32."""
    ratios = {}
    for name, speed in speeds.items():
        if not name.startswith("ours"):
            continue
        one = name.split(", transformers'")[0].endswith("1 story")
        llama2c = LLAMA2C_INT8 if "int8" in name else LLAMA2C
        for peer in (GPT2_ONE, llama2c) if one else (GPT2_MANY,):
            if peer in speeds:
                ratios[f"{name} / {peer}"] = speed.ratio_to(speeds[peer])
    return ratios


def _format_table(speeds: dict[str, Stats], ratios: dict[str, Stats]) -> str:
    rows = []
    for name, speed in speeds.items():
        cells = []
        for peers in ((GPT2_ONE, GPT2_MANY), (LLAMA2C, LLAMA2C_INT8)):
            found = [ratios[f"{name} / {peer}"] for peer in peers if f"{name} / {peer}" in ratios]
            cells.append(found[0].text("{:.2f}") if found else "")
        rows.append([name, speed.text(), *cells])
    return markdown_table(["", "tokens/s", "times GPT2LMHeadModel", "times llama2.c"], rows)


def draw(speeds: dict[str, Stats], path: Path) -> None:
    """Chart the tokens per second."""
    bar_chart(path, {"": speeds}, xlabel="tokens per second (median and range of the rounds)")


if __name__ == "__main__":
    main()

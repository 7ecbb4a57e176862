"""Fit the laws of `tinystories_slm/planning/law.json` to measured runs.

    python benchmarks/planning_law.py

The runs on TinyStories are those of recipe_shapes.json, time_to_quality.json and planning.json in
benchmarks/results, those on the built-in corpus of planning.json: of the runs of one size and one number of
tokens the best one. The exponents are searched on a grid; for each pair the other constants follow from least
squares of the relative errors. The built-in corpus has its entropy as E.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import NamedTuple

import numpy as np
from harness import ROOT, read_result

from tinystories_slm.config import RunConfig, parse_config
from tinystories_slm.model_costs import num_embedding_parameters, num_parameters
from tinystories_slm.planning.law import BUILTIN, LAW_FILE, STORIES

EXPONENTS = np.arange(0.05, 1.5, 0.025)
VOCAB_SIZES = {STORIES: 4096, BUILTIN: 2048}
BYTES_PER_TOKEN = {STORIES: 3.96, BUILTIN: 3.85}
"""16,667,743 bytes in 4,204,666 tokens, 32,635,744 in 8,487,838."""
SOURCES = {
    STORIES: ("recipe_shapes.json", "time_to_quality.json", "planning.json"),
    BUILTIN: ("planning.json",),
}


class Run(NamedTuple):
    """A trained run: size without embeddings, training tokens and bits per byte of held-out text."""

    num_parameters: int
    num_tokens: int
    bits_per_byte: float


class Fit(NamedTuple):
    """Constants of L(N, D), and the root mean square of the relative errors."""

    error: float
    exponents: tuple[float, float]
    constants: tuple[float, float, float]


def main() -> None:
    records = {}
    for name in (STORIES, BUILTIN):
        runs = best_runs([*read_runs(name)])
        entropy = read_result("planning").get("entropy") if name == BUILTIN else None
        records[name] = to_record(name, runs, fit(runs, entropy))
        print(f"{name}: {len(runs)} runs, relative error {records[name]['relative_error']:.4f}")
    LAW_FILE.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def read_runs(name: str) -> Iterator[Run]:
    """Yield the runs of a law from the results."""
    for row in read_result("planning")["rows"]:
        if row["corpus"] == name and row["vocab_size"] == VOCAB_SIZES[name]:
            yield Run(row["num_parameters"], row["tokens"], row["bits_per_byte"])
    if name == BUILTIN:
        return
    for row in read_result("recipe_shapes")["rows"]:
        preset = "ten_minutes" if row["comparison"] == "ten_minutes" else "minute"
        flags = {key: value for key, value in row["flags"].items() if key != "train.momentum"}
        config = read_preset(preset, [f"--{key}={value}" for key, value in flags.items()])
        if config.tokenizer.vocab_size == VOCAB_SIZES[name]:
            num_tokens = row["steps"] * config.train.batch_size * config.data.seq_len
            yield Run(size(config), num_tokens, row["bits_per_byte"])
    for row in read_result("time_to_quality")["ours"]:
        config = parse_config([f"--config={ROOT / row['config']}"])
        for num_tokens, loss in zip(row["training_tokens"], row["bits_per_byte"]["values"], strict=True):
            yield Run(size(config), num_tokens, loss)


def read_preset(name: str, flags: Sequence[str]) -> RunConfig:
    """Return the configuration of a preset with flags."""
    return parse_config([f"--config={ROOT / 'configs' / name}.yaml", *flags])


def size(config: RunConfig) -> int:
    """Return the parameters without embeddings."""
    model = config.model_config(vocab_size=config.tokenizer.vocab_size)
    return num_parameters(model) - num_embedding_parameters(model)


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the best run of each size and number of tokens."""
    best: dict[tuple[int, int], Run] = {}
    for run in runs:
        key = run[:2]
        best[key] = min(best.get(key, run), run, key=lambda one: one.bits_per_byte)
    return sorted(best.values())


def fit(runs: Sequence[Run], irreducible: float | None) -> Fit:
    """Return the law with the smallest error; `irreducible` is E if it is known."""
    sizes, tokens, losses = (np.array(column, dtype=float) for column in zip(*runs, strict=True))
    best: Fit | None = None
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        terms = np.stack([np.ones_like(losses), sizes**-alpha, tokens**-beta], axis=1) / losses[:, None]
        known = 0.0 if irreducible is None else irreducible
        free = terms if irreducible is None else terms[:, 1:]
        constants, *_ = np.linalg.lstsq(free, 1.0 - known * terms[:, 0] * (irreducible is not None))
        if irreducible is not None:
            constants = np.array([irreducible, *constants])
        error = float(np.sqrt(np.mean((terms @ constants - 1.0) ** 2)))
        if (constants >= 0).all() and (best is None or error < best.error):
            best = Fit(error, (float(alpha), float(beta)), tuple(map(float, constants)))
    if best is None:
        raise SystemExit("error: no law with positive constants fits the runs; add runs of other sizes")
    return best


def to_record(name: str, runs: Sequence[Run], found: Fit) -> dict:
    """Return a law as in law.json."""
    (alpha, beta), (irreducible, size_factor, token_factor) = found.exponents, found.constants
    sizes, tokens, _ = zip(*runs, strict=True)
    return {
        "irreducible": irreducible,
        "terms": {
            "parameters": {"factor": size_factor, "exponent": round(alpha, 3)},
            "tokens": {"factor": token_factor, "exponent": round(beta, 3)},
        },
        "relative_error": found.error,
        "vocab_size": VOCAB_SIZES[name],
        "bytes_per_token": BYTES_PER_TOKEN[name],
        "parameters_range": [min(sizes), max(sizes)],
        "tokens_range": [min(tokens), max(tokens)],
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python benchmarks/planning_law.py",
            "results": [f"benchmarks/results/{source}" for source in SOURCES[name]],
            "runs": [list(run) for run in runs],
        },
    }


if __name__ == "__main__":
    main()

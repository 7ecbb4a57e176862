"""Measure training beside busy programs, by the setting of the OpenMP threads.

    python benchmarks/company.py

Ours is scripts/train.py with the shape of configs/minute.yaml on random token ids (random_tokens.py). The
neighbors are Python programs that compute without end: n of them leave c / (c + n) of c cores as a fair
share. Settings run interleaved. Writes benchmarks/results/company.json and the table of docs/speed.md.
`--quick` runs everything for some steps and writes nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from harness import (
    ONLY_TRAINING,
    ROOT,
    Stats,
    fill_table,
    markdown_table,
    provenance,
    run_interleaved,
    run_train,
    write_result,
)
from random_tokens import write_random_tokens

from tinystories_slm.config import TokenizerArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.hardware.host import num_usable_cores
from tinystories_slm.runs.records import read_metrics

PAGE = ROOT / "docs" / "speed.md"
SETTINGS: dict[str, Mapping[str, str]] = {
    "as shipped": {},
    "OMP_WAIT_POLICY=active": {"OMP_WAIT_POLICY": "active"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbors", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of every setting")
    parser.add_argument("--steps", type=int, default=120, help="of each run; the first third is warm-up")
    parser.add_argument("--quick", action="store_true", help="one round of few steps; writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.neighbors, args.rounds, args.steps = [0, 1], 1, 6
    with tempfile.TemporaryDirectory() as scratch:
        data = write_random_tokens(Path(scratch) / "data", vocab_size=4096, num_tokens=2**20)
        measure = partial(_measure, data, args.steps, Path(scratch), count())
        contenders = {
            (neighbors, setting): partial(measure, neighbors, SETTINGS[setting])
            for neighbors in args.neighbors
            for setting in args.settings
        }
        outcomes = run_interleaved(contenders, args.rounds)
    speeds = {key: Stats.of(values) for key, values in outcomes.items()}
    table = _format_table(speeds, args.neighbors, args.settings)
    print(table)
    if not args.quick:
        rows = {f"{setting}, {number} neighbors": stats for (number, setting), stats in speeds.items()}
        write_result("company", {**provenance(), "steps": args.steps, "tokens_per_second": rows})
        fill_table(PAGE, "benchmarks/company.py", table)


def _measure(
    data: Sequence[str],
    steps: int,
    scratch: Path,
    run_numbers: "count[int]",
    num_neighbors: int,
    env: Mapping[str, str],
) -> float:
    """Return the tokens per second of a run after its first third, beside the neighbors."""
    run_dir = scratch / f"run_{next(run_numbers)}"
    flags = ONLY_TRAINING | {
        "data.max_stories": None,
        "tokenizer.max_stories": TokenizerArgs().max_stories,
        "output_dir": run_dir,
        "train.max_steps": steps,
        "train.max_minutes": None,
        "train.warmup_steps": 1,
        "train.log_every": max(1, steps // 3),
    }
    with _neighbors(num_neighbors):
        run_train(["--config=configs/minute.yaml", *data, *to_flags(flags)], env=env)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]
    first, last = lines[0], lines[-1]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


@contextmanager
def _neighbors(number: int) -> Iterator[None]:
    """Run `number` busy programs during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _format_table(
    speeds: Mapping[tuple[int, str], Stats], neighbors: Sequence[int], settings: Sequence[str]
) -> str:
    """Return tokens per second by neighbors and setting, with the share of the shipped speed alone."""
    alone = speeds[neighbors[0], settings[0]]
    cores = num_usable_cores()
    head = ["neighbors", "fair share", *settings]
    rows = [
        [
            str(number),
            f"{min(1.0, cores / (cores + number)):.2f}",
            *(
                f"{speeds[number, setting].text()}, {speeds[number, setting].median / alone.median:.2f}"
                for setting in settings
            ),
        ]
        for number in neighbors
    ]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()

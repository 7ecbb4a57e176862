"""Measure training beside busy programs, by how long the OpenMP threads spin before they sleep.

    python benchmarks/company.py

Ours is scripts/train.py with the shape of configs/minute.yaml on random token ids (random_tokens.py). There
are two such runs for each setting. All are stopped (SIGSTOP) but the measured one, so that windows of some
seconds are interleaved: alone, beside Python programs that compute without end, and beside the second run of
the same setting. n programs leave c / (c + n) of c cores as a fair share.

Writes benchmarks/results/company.json and the table of docs/speed.md. `--quick` measures one short window of
each and writes nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from harness import (
    ONLY_TRAINING,
    ROOT,
    Stats,
    fill_table,
    markdown_table,
    provenance,
    run_interleaved,
    write_result,
)
from random_tokens import write_random_tokens

from tinystories_slm.config import TokenizerArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.hardware.host import num_usable_cores

PAGE = ROOT / "docs" / "speed.md"
SHIPPED = "as shipped"
SETTINGS: dict[str, Mapping[str, str]] = {
    "300,000 turns (GNU's default)": {"GOMP_SPINCOUNT": "300000"},
    SHIPPED: {},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "no turn (OMP_WAIT_POLICY=passive)": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_BUSY = "while True: pass"
_TAIL_BYTES = 2048
"""More than two lines of metrics: the file is read while it grows, many times a second."""
_SETTLE_S = 0.5
"""After a change of what runs, before a window begins."""


class Run:
    """A training run in a process of its own, stopped except while it is measured."""

    def __init__(self, flags: Sequence[str], output_dir: Path, env: Mapping[str, str]) -> None:
        self._metrics = output_dir / "metrics.jsonl"
        self._log = output_dir.with_suffix(".log")
        command = [sys.executable, "scripts/train.py", *flags, f"--output_dir={output_dir}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, stdout=log, stderr=log
            )

    def wait_for_step(self) -> None:
        """Wait for the first step, and stop the process."""
        while self.tokens() == 0:
            self._check()
            time.sleep(0.2)
        self._process.send_signal(signal.SIGSTOP)

    def next_step(self) -> tuple[int, float]:
        """Wait for the end of a step; return the tokens until then and the time."""
        before = self.tokens()
        while (tokens := self.tokens()) == before:
            self._check()
            time.sleep(0.002)
        return tokens, time.perf_counter()

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"error: a run ended: {self._log.read_text()}")

    def tokens(self) -> int:
        """Return the tokens of the last step whose line is in the metrics file."""
        if not self._metrics.exists():
            return 0
        with self._metrics.open("rb") as file:
            file.seek(max(0, self._metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)[1:]
        steps = [json.loads(line) for line in lines if line.endswith(b"\n") and b"train/loss" in line]
        return steps[-1]["tokens"] if steps else 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the process run during the block."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbors", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=8, help="windows of every setting and company")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each window")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--quick", action="store_true", help="one short window of each; writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.neighbors, args.settings, args.rounds, args.seconds = [0, 1], [SHIPPED], 1, 0.5
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        flags = _training_flags(Path(scratch), args.mixed_precision)
        runs = {}
        for number, setting in enumerate(args.settings):
            runs[setting] = []
            for copy in range(2):
                run = Run(flags, Path(scratch) / f"run_{number}_{copy}", SETTINGS[setting])
                stack.callback(run.end)
                run.wait_for_step()
                runs[setting].append(run)
        contenders = {}
        for setting, (first, second) in runs.items():
            for number in args.neighbors:
                contenders[_company(number), setting] = partial(_measure, first, args.seconds, number)
            contenders["another run", setting] = partial(_measure, first, args.seconds, beside=second)
        outcomes = run_interleaved(contenders, args.rounds)
    speeds = {key: Stats.of(values) for key, values in outcomes.items()}
    table = format_table(speeds, args.neighbors, args.settings)
    print(table)
    if not args.quick:
        rows = {f"{setting}, {company}": stats for (company, setting), stats in speeds.items()}
        write_result(
            "company", {**provenance(), "precision": args.mixed_precision, "tokens_per_second": rows}
        )
        fill_table(PAGE, "benchmarks/company.py", table)


def _training_flags(scratch: Path, mixed_precision: str) -> list[str]:
    data = write_random_tokens(scratch / "data", vocab_size=4096, num_tokens=2**20)
    flags = ONLY_TRAINING | {
        "data.max_stories": None,
        "tokenizer.max_stories": TokenizerArgs().max_stories,
        "train.max_steps": 10**6,
        "train.max_minutes": None,
        "train.warmup_steps": 1,
        "train.log_every": 1,
        "train.mixed_precision": mixed_precision,
    }
    return ["--config=configs/minute.yaml", *data, *to_flags(flags)]


def _measure(run: Run, seconds: float, num_programs: int = 0, beside: Run | None = None) -> float:
    """Return the tokens per second of a run in a window, from the end of one step to the end of another."""
    with _busy_programs(num_programs), ExitStack() as stack:
        for one in filter(None, (run, beside)):
            stack.enter_context(one.running())
        time.sleep(_SETTLE_S)
        first, start = run.next_step()
        time.sleep(seconds)
        last, end = run.next_step()
    return (last - first) / (end - start)


@contextmanager
def _busy_programs(number: int) -> Iterator[None]:
    """Run `number` programs that compute without end during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _company(num_programs: int) -> str:
    return {0: "nothing", 1: "1 program"}.get(num_programs, f"{num_programs} programs")


def format_table(
    speeds: Mapping[tuple[str, str], Stats], neighbors: Sequence[int], settings: Sequence[str]
) -> str:
    """Return tokens per second by company and setting, with the share of the shipped speed alone."""
    alone = speeds[_company(0), SHIPPED if SHIPPED in settings else settings[0]]
    cores = num_usable_cores()
    shares = {_company(number): min(1.0, cores / (cores + number)) for number in neighbors}
    rows = [
        [
            company,
            f"{share:.2f}",
            *(
                f"{speeds[company, setting].text()}, {speeds[company, setting].median / alone.median:.2f}"
                for setting in settings
            ),
        ]
        for company, share in {**shares, "another run": 0.5}.items()
    ]
    return markdown_table(["beside", "fair share", *settings], rows)


if __name__ == "__main__":
    main()

"""Train on hosts of a slow network: seconds of a step beside the bound of the link, and what a fault prints.

    python benchmarks/network.py        # needs root; about ten minutes

Two and four hosts are network namespaces of this machine (virtual_network.py), each with one torchrun and
one process of a thread. The model is so small that the link decides. Writes benchmarks/results/network.json
and a table of docs/communication.md; `--quick` runs one row on few steps and writes nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from harness import ONLY_TRAINING, ROOT, fill_table, markdown_table, provenance, write_result
from random_tokens import write_random_tokens
from virtual_network import Link, Network, missing_requirement, virtual_network

from tinystories_slm.config import parse_config
from tinystories_slm.config.flags import to_flags
from tinystories_slm.model_costs import num_parameters
from tinystories_slm.runs.records import read_metrics
from tinystories_slm.training.communication import Collective

PAGE = ROOT / "docs" / "communication.md"
VOCAB_SIZE = 4096
LOG_EVERY = 5
TIMEOUT_S = 20
SHAPE = {
    "data.seq_len": 32,
    "model.hidden_size": 128,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "train.batch_size": 4,
    "train.log_every": LOG_EVERY,
    "train.warmup_steps": 2,
    "train.mixed_precision": "no",
    "train.timeout_s": TIMEOUT_S,
}
LINKS = {
    "100 Mbit/s": Link(),
    "100 Mbit/s, 1 ms": Link(delay_s=1e-3),
    "100 Mbit/s, 50 ms": Link(delay_s=50e-3),
    "100 Mbit/s, 1 ms, 1 % lost": Link(delay_s=1e-3, loss=0.01),
}
ROWS = [("100 Mbit/s", "bfloat16"), *((link, "float32") for link in LINKS)]
"""Link and `train.reduce_dtype`."""
_PORT = 29500


@dataclass(frozen=True)
class Outcome:
    """End of a run on several hosts."""

    codes: list[int]
    """Exit codes of the launchers."""
    errors: list[str]
    """Standard error of each host."""
    seconds: list[float]
    """End of each launcher, after the start or the last action."""
    step_s: float | None
    """Median seconds of a step after the first third; None without enough log lines."""
    sent_bytes: float | None
    """Bytes that the first host sent for each step."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of each run; the first third is warm-up")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--quick", action="store_true", help="one row, few steps; writes nothing")
    args = parser.parse_args(argv)
    if reason := missing_requirement():
        sys.exit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_random_tokens(folder / "data", vocab_size=VOCAB_SIZE, num_tokens=2**16)
        if args.quick:
            print(measure_link(folder, data, "100 Mbit/s, 1 ms", 2, steps=15))
            return
        result = {"shape": SHAPE, "links": [], "faults": []}
        for seconds in (5, None):
            result["faults"].append(measure_fault(folder, data, seconds))
            record(result)
        for num_hosts, (link, dtype) in product(args.hosts, ROWS):
            row = measure_link(folder, data, link, num_hosts, steps=args.steps, reduce_dtype=dtype)
            result["links"].append(row)
            record(result)


def record(result: dict) -> None:
    """Write what was measured so far."""
    write_result("network", provenance() | result)
    head = ["hosts", "link", "sum of gradients", "bound, s", "step, s", "bound / step", "MB sent / bound"]
    table = [
        [
            row["hosts"], row["link"], row["reduce_dtype"], f"{row['bound_s']:.2f}", f"{row['step_s']:.2f}",
            f"{row['bound_s'] / row['step_s']:.0%}", f"{row['sent_mb']:.2f} / {row['bound_mb']:.2f}",
        ]
        for row in result["links"]
    ]  # fmt: skip
    fill_table(PAGE, "benchmarks/network.py", markdown_table(head, table))


def measure_link(
    folder: Path, data: list[str], link: str, num_hosts: int, *, steps: int, reduce_dtype: str = "float32"
) -> dict:
    """Train on `num_hosts` hosts, and return the seconds of a step and their bound."""
    print(f"{num_hosts} hosts, {link}, {reduce_dtype}", file=sys.stderr, flush=True)
    flags = [*data, f"--train.max_steps={steps}", f"--train.reduce_dtype={reduce_dtype}"]
    outcome = train(folder, flags, num_hosts, LINKS[link])
    if any(outcome.codes):
        raise RuntimeError("\n".join(outcome.errors))
    collectives = step_collectives(reduce_dtype)
    sent = sum(each.ring_bytes(num_hosts) for each in collectives)
    hops = sum(each.num_hops(num_hosts) for each in collectives)
    return {
        "hosts": num_hosts,
        "link": link,
        "reduce_dtype": reduce_dtype,
        "step_s": outcome.step_s,
        "bound_s": 8 * sent / LINKS[link].bits_per_s + hops * LINKS[link].delay_s,
        "sent_mb": outcome.sent_bytes / 1e6,
        "bound_mb": sent / 1e6,
    }


def step_collectives(reduce_dtype: str) -> list[Collective]:
    """Collective operations of a step on CPUs: the sum of gradients, and that of the requests to stop."""
    config = parse_config([*to_flags(SHAPE), f"--tokenizer.vocab_size={VOCAB_SIZE}"])
    num_weights = num_parameters(config.model_config(vocab_size=VOCAB_SIZE))
    width = 2 if reduce_dtype == "bfloat16" else 4
    return [Collective("all_reduce", width * num_weights), Collective("all_reduce", 40)]


def measure_fault(folder: Path, data: list[str], seconds: float | None) -> dict:
    """Cut one of two hosts off after some steps, for `seconds` or for good, and return what happened."""
    print(f"2 hosts, cut off for {seconds or 'ever'}", file=sys.stderr, flush=True)

    def cut(network: Network) -> None:
        network.cut(1)
        if seconds is not None:
            time.sleep(seconds)
            network.restore(1)

    outcome = train(folder, [*data, "--train.max_steps=60"], 2, LINKS["100 Mbit/s, 1 ms"], cut)
    lines = [own_lines(error) for error in outcome.errors]
    return {"cut_s": seconds, "codes": outcome.codes, "seconds": outcome.seconds, "lines": lines}


def own_lines(error: str) -> list[str]:
    """Return the lines of our own about the end of a run, without those of the launcher."""
    starts = ("no progress", "error:", "run complete")
    return [line for line in error.splitlines() if line.startswith(starts)]


def train(
    folder: Path,
    flags: Sequence[str],
    num_hosts: int,
    link: Link,
    act: Callable[[Network], None] | None = None,
    *,
    timeout_s: float = 600,
) -> Outcome:
    """Run train.py under torchrun on `num_hosts` hosts; `act` is called after the first log lines."""
    with tempfile.TemporaryDirectory(dir=folder) as run, virtual_network(num_hosts, link) as network:
        output = Path(run) / "run"
        config = [f"--output_dir={output}", *to_flags(SHAPE | ONLY_TRAINING), *flags]
        processes = []
        started_s = time.monotonic()
        for rank, host in enumerate(network.hosts):
            launcher = ["-m", "torch.distributed.run", f"--nnodes={num_hosts}", f"--node_rank={rank}"]
            meet = ["--nproc_per_node=1", "--master_addr=host0", f"--master_port={_PORT}"]
            with open(Path(run) / f"stderr{rank}", "w") as stderr:
                processes.append(
                    subprocess.Popen(
                        host.command(
                            [sys.executable, *launcher, *meet, ROOT / "scripts" / "train.py", *config]
                        ),
                        cwd=run,
                        env=os.environ
                        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)},
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                )
        try:
            first = _wait_for_lines(output, 2, processes, timeout_s)
            sent_before = network.sent_bytes[0]
            if act:
                started_s = time.monotonic()
                act(network)
            ends = {}
            while len(ends) < num_hosts and time.monotonic() < started_s + timeout_s:
                for rank, process in enumerate(processes):
                    if process.poll() is not None:
                        ends.setdefault(rank, time.monotonic() - started_s)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = _log_lines(output)
        num_steps = lines[-1]["step"] - first if lines else 0
        return Outcome(
            codes=[process.returncode for process in processes],
            errors=[
                (Path(run) / f"stderr{rank}").read_text().replace(run, "FOLDER") for rank in range(num_hosts)
            ],
            seconds=[round(ends.get(rank, timeout_s), 1) for rank in range(num_hosts)],
            step_s=_median_step_s(lines),
            sent_bytes=(network.sent_bytes[0] - sent_before) / num_steps if num_steps > 0 else None,
        )


def _wait_for_lines(output: Path, number: int, processes: list[subprocess.Popen], timeout_s: float) -> int:
    """Wait for `number` log lines and return the step of the last; 0 if a process ends before."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s and all(process.poll() is None for process in processes):
        if len(lines := _log_lines(output)) >= number:
            return lines[-1]["step"]
        time.sleep(0.05)
    return 0


def _log_lines(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [line for line in read_metrics(path) if "train/loss" in line] if path.exists() else []


def _median_step_s(lines: list[dict]) -> float | None:
    """Return the median seconds of a step between log lines, without the first third."""
    kept = lines[len(lines) // 3 :]
    pairs = list(pairwise(kept))
    if not pairs:
        return None
    return statistics.median((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs)


if __name__ == "__main__":
    main()

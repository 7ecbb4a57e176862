"""Measure download, tokenizer and preparation on up to 2.1 million stories: time, memory and disk.

    python benchmarks/data_size.py --sizes 100000 500000 2100000

The grammar writes the stories, and a third of their words are replaced by words of other stories: its stories
are near duplicates of each other, and most would be dropped. They lie in parquet files of 100,000. Cleaning
and deduplication are on. Memory is the sum over all processes of a step, sampled ten times a second. Seconds
are of the processors (user and system), and of the clock in brackets. Disk is the largest size of the data
folder. Writes benchmarks/results/data_size.json and the table of docs/data.md.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from harness import ROOT, fill_table, markdown_table, provenance, write_result

from tinystories_slm.grammar import generate_corpus

FILE_STORIES = 100_000
STEPS = ("download_data", "train_tokenizer", "prepare_data")


@dataclass(frozen=True)
class StepResult:
    """Cost of one step."""

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    peak_disk_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 500_000, 2_100_000])
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "size", help="for all files")
    parser.add_argument("--quick", action="store_true", help="few stories; writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes = [300, 600]
    file_stories = 300 if args.quick else FILE_STORIES
    files = write_stories(args.folder / "stories", max(args.sizes), file_stories)
    rows, results = [], []
    for size in sorted(args.sizes):
        source = args.folder / f"source_{size}"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        for file in files[: -(-size // file_stories)]:
            os.link(file, source / file.name)
        steps = measure_steps(source, args.folder / f"data_{size}", size)
        results.append({"stories": size, "steps": {name: vars(step) for name, step in steps.items()}})
        rows.append([f"{size:,}", *format_steps(steps)])
        print(rows[-1], flush=True)
    head = ["stories", *STEPS, "together", "peak memory", "peak disk"]
    table = markdown_table(head, rows)
    print(table)
    if not args.quick:
        write_result("data_size", {**provenance(), "sizes": results})
        fill_table(ROOT / "docs" / "data.md", "python benchmarks/data_size.py", table)


def write_stories(folder: Path, num_stories: int, file_stories: int) -> list[Path]:
    """Return parquet files of `file_stories` stories each; they are written if one is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"train-{index:05d}.parquet" for index in range(-(-num_stories // file_stories))]
    if not all(file.exists() for file in files):
        stories = varied_stories()
        for file in files:
            texts = pa.table({"text": list(islice(stories, file_stories))})
            pq.write_table(texts, file, row_group_size=10_000, compression="zstd")
    return files


def varied_stories() -> Iterator[str]:
    """Yield stories of the grammar with a third of their words replaced, without end."""
    rng = random.Random(0)
    words = sorted({word for story in generate_corpus(2000) for word in story.split()})
    for story in generate_corpus(2**40):
        *others, last = story.split(" ")  # a story without its last sentence end would be dropped
        yield " ".join([*(rng.choice(words) if rng.random() < 1 / 3 else word for word in others), last])


def measure_steps(source: Path, data_dir: Path, num_stories: int) -> dict[str, StepResult]:
    """Run the steps on a new data folder, one process each."""
    shutil.rmtree(data_dir, ignore_errors=True)
    flags = [f"--data.source={source}", f"--data.data_dir={data_dir}", f"--data.max_stories={num_stories}"]
    flags += ["--data.cleaning=true", "--data.deduplicate=true", "--tokenizer.vocab_size=4096"]
    steps = {name: measure_step([f"scripts/{name}.py", *flags], data_dir) for name in STEPS}
    shutil.rmtree(data_dir)
    return steps


def measure_step(argv: Sequence[str], data_dir: Path) -> StepResult:
    """Run a Python program and measure it.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started_s, before = time.perf_counter(), os.times()
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    peaks = {"memory": 0, "disk": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            peaks["memory"] = max(peaks["memory"], tree_memory(process.pid))
            peaks["disk"] = max(peaks["disk"], folder_size(data_dir))

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = process.wait()
    ended.set()
    sampler.join()
    if status:
        raise subprocess.CalledProcessError(status, argv)
    after = os.times()
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return StepResult(
        seconds=time.perf_counter() - started_s,
        cpu_seconds=cpu_seconds,
        peak_memory_bytes=peaks["memory"],
        peak_disk_bytes=max(peaks["disk"], folder_size(data_dir)),
    )


def tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 if it has ended."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder that may change meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def format_steps(steps: dict[str, StepResult]) -> list[str]:
    """Return the cells of a row: seconds of each step and of all, peak memory and disk."""
    seconds = [f"{step.cpu_seconds:.0f} s ({step.seconds:.0f} s)" for step in steps.values()]
    cpu_seconds = sum(step.cpu_seconds for step in steps.values())
    total = sum(step.seconds for step in steps.values())
    memory = max(step.peak_memory_bytes for step in steps.values())
    disk = max(step.peak_disk_bytes for step in steps.values())
    return [
        *seconds, f"{cpu_seconds:.0f} s ({total:.0f} s)", f"{memory / 1e9:.2f} GB", f"{disk / 1e9:.2f} GB"
    ]  # fmt: skip


if __name__ == "__main__":
    main()

"""What every benchmark shares: the machine it ran on, contenders that take turns, medians, results, tables.

Imports nothing of the project, and torch only to describe the machine.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
END = "<!-- end of table -->"

Outcome = TypeVar("Outcome")


def machine() -> dict[str, str | int]:
    """Processor, cores and the instructions that decide the speed of bf16."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "bf16": ", ".join(n for n in ("amx_bf16", "avx512_bf16") if capabilities.get(n)) or "emulated",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions(packages: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Of Python and those of `packages` that are installed, by the names they are installed under."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def command(argv: Sequence[str] | None = None) -> str:
    """How the program was called, for people: folders outside of this checkout are PATH."""
    shown = []
    for argument in argv or sys.argv:
        flag, equals, value = argument.rpartition("=")
        if Path(value).is_absolute() or Path(value).parts[:1] == ("..",):
            inside = Path(value).is_relative_to(ROOT)
            value = str(Path(value).relative_to(ROOT)) if inside else "PATH"
        shown.append(f"{flag}{equals}{value}")
    return shlex.join(["python", *shown])


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and how far they lie apart."""

    median: float
    min: float
    max: float
    values: list[float]
    """In the order in which they were measured."""

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 4) -> "Spread":
        """`digits` significant ones are kept: more than a clock is worth."""
        rounded = [float(f"{value:.{digits}g}") for value in values]
        return cls(
            float(f"{statistics.median(values):.{digits}g}"), min(rounded), max(rounded), list(rounded)
        )

    def over(self, other: "Spread") -> "Spread":
        """The ratios of this to `other`, round by round: what slows a whole round cancels out."""
        return Spread.of([a / b for a, b in zip(self.values, other.values, strict=True)])

    def text(self, format: str = "{:,.0f}") -> str:
        """Median and, where there is any, spread: `3,480 (3,401 to 3,502)`."""
        median, low, high = map(format.format, (self.median, self.min, self.max))
        return median if low == high else f"{median} ({low} to {high})"


def interleaved(contenders: Mapping[str, Callable[[], Outcome]], rounds: int) -> dict[str, list[Outcome]]:
    """Every contender once a round, so that a machine that slows down slows all of them.

    Every other round goes backwards: none is always the one that runs after the slowest.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            outcomes[name].append(contenders[name]())
    return outcomes


# Its own memory is small: what the kernel counts for a child begins with what its parent had at the fork.
_LAUNCHER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=file)
sys.exit(status)
"""


@dataclass(frozen=True)
class Line:
    """What a process printed, and when: seconds after it was started."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    lines: list[Line]
    """Of its standard output and standard error, in one."""
    seconds: float
    """From its start to its end."""
    peak_bytes: int
    """The most memory (resident) that it, or the largest of its own children, ever held."""

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


def run_process(
    arguments: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    watch: Callable[[Line], None] = lambda line: None,
) -> Finished:
    """Run a program in a process of its own, and wait for it; `env` is added to this process's.

    `watch` sees each line as it comes. Python programs are told not to hold lines back, and to write no
    bytecode into folders that are not ours.

    Raises:
        RuntimeError: it failed; with the last of what it printed.
    """
    settings = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "peak"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report)]
        started_s = time.perf_counter()
        with subprocess.Popen(
            [*launcher, *map(str, arguments)],
            cwd=cwd,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            lines = []
            for text in process.stdout:
                lines.append(Line(text.rstrip("\n"), time.perf_counter() - started_s))
                watch(lines[-1])
        seconds = time.perf_counter() - started_s
        if process.returncode:
            last = "\n".join(line.text for line in lines[-20:])
            raise RuntimeError(f"{shlex.join(map(str, arguments))} failed ({process.returncode}):\n{last}")
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return Finished(lines, seconds, int(report.read_text()) * unit)


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/NAME.json; any `Spread` in it becomes a dictionary."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=asdict)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Lines of a Markdown table, each ended."""
    first, *rest = ("| " + " | ".join(map(str, line)) + " |\n" for line in [head, *rows])
    return "".join([first, "|---" * len(head) + "|\n", *rest])


def fill_table(page: Path, begin: str, table: str) -> None:
    """Put `table` between the line `<!-- table: BEGIN -->` of a page and the next `END` after it."""
    mark = f"<!-- table: {begin} -->"
    before, found, after = page.read_text(encoding="utf-8").partition(mark)
    if not found or END not in after:
        raise ValueError(f"{page} has no table between {mark!r} and {END!r}")
    page.write_text(f"{before}{mark}\n{table}{END}{after.split(END, 1)[1]}", encoding="utf-8")

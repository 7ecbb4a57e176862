"""Shared parts of the benchmarks: provenance, processes, rounds, statistics, results, tables and charts."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinystories_slm.hardware.host import installed_version, num_usable_cores, processor_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
END = "<!-- end of table -->"
# Spend a run's time on training: one evaluation, on one story, and one save, at the end.
ONLY_TRAINING = {"train.eval_every": 10**7, "train.save_every": 10**7, "train.eval_stories": 1}

Outcome = TypeVar("Outcome")


def machine() -> dict[str, str | int]:
    """Processor, cores and the instructions that decide the speed of bf16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": processor_name(),
        "cores": num_usable_cores(),
        "bf16": ", ".join(n for n in ("amx_bf16", "avx512_bf16") if capabilities.get(n)) or "emulated",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions(packages: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of the installed `packages`."""
    installed = {name: version for name in packages if (version := installed_version(name))}
    return installed | {"python": platform.python_version()}


def command(argv: Sequence[str] | None = None) -> str:
    """Command line of this program; paths outside this checkout become PATH."""
    shown = []
    for argument in argv or sys.argv:
        flag, equals, value = argument.rpartition("=")
        if Path(value).is_absolute() or Path(value).parts[:1] == ("..",):
            inside = Path(value).is_relative_to(ROOT)
            value = str(Path(value).relative_to(ROOT)) if inside else "PATH"
        shown.append(f"{flag}{equals}{value}")
    return shlex.join(["python", *shown])


def provenance(packages: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Command, machine and versions: the head of every result file."""
    return {"command": command(), "machine": machine(), "versions": versions(packages)}


def git_revision(checkout: Path) -> str:
    """Commit of `checkout`, with `-dirty` if files are modified; `unknown` without a git history.

    A source archive has no history. A repository around the folder is not searched: its commit is another
    project's.
    """
    arguments = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty"]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.resolve().parent)}
    try:
        described = subprocess.run(arguments, capture_output=True, text=True, check=True, env=env)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Stats:
    """Median and range of some measurements."""

    median: float
    min: float
    max: float
    values: list[float]
    """In the order of measurement."""

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 4) -> "Stats":
        """Compute the statistics of `values`, rounded to `digits` significant digits."""
        rounded = [float(f"{value:.{digits}g}") for value in values]
        median = float(f"{statistics.median(values):.{digits}g}")
        return cls(median, min(rounded), max(rounded), rounded)

    def ratio_to(self, other: "Stats") -> "Stats":
        """Ratios of this to `other`, round by round, so that a slow round cancels out."""
        return Stats.of([a / b for a, b in zip(self.values, other.values, strict=True)])

    def text(self, format: str = "{:,.0f}") -> str:
        """Median and, if the values differ, range: `3,480 (3,401 to 3,502)`."""
        median, low, high = map(format.format, (self.median, self.min, self.max))
        return median if low == high else f"{median} ({low} to {high})"


def run_interleaved(contenders: Mapping[str, Callable[[], Outcome]], rounds: int) -> dict[str, list[Outcome]]:
    """Run every contender once per round, so that a machine that slows down slows all of them.

    Every second round runs in reverse order, so that no contender always follows the slowest.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            outcomes[name].append(contenders[name]())
    return outcomes


# The launcher is small: the kernel's peak memory of a child starts at the size of its parent at the fork.
_LAUNCHER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=file)
sys.exit(status)
"""


@dataclass(frozen=True)
class Line:
    """One printed line of a process, with its time in seconds after the start."""

    text: str
    seconds: float


@dataclass(frozen=True)
class ProcessResult:
    """Output, duration and peak memory of a successful process."""

    lines: list[Line]
    """Standard output and standard error, merged."""
    seconds: float
    """From its start to its end."""
    peak_bytes: int
    """Peak resident memory of the process or of its largest child."""

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


def run_process(
    arguments: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    watch: Callable[[Line], None] = lambda line: None,
) -> ProcessResult:
    """Run a program in a new process and wait for it; `env` is added to this process's environment.

    `watch` is called with each line as soon as it is printed. Python programs print unbuffered and write no
    bytecode into other projects' folders.

    Raises:
        RuntimeError: the process failed; the message has its last 20 lines.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "peak"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report)]
        started_s = time.perf_counter()
        with subprocess.Popen(
            [*launcher, *map(str, arguments)],
            cwd=cwd,
            env=environment,
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
        return ProcessResult(lines, seconds, int(report.read_text()) * unit)


def run_train(
    flags: Sequence[str], *, launcher: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> ProcessResult:
    """Run scripts/train.py of this checkout with `flags`, in a new process."""
    arguments = [sys.executable, *launcher, "scripts/train.py", *flags]
    return run_process(arguments, env={"PYTHONPATH": str(ROOT), **(env or {})})


def read_result(name: str) -> dict[str, Any]:
    """Read benchmarks/results/NAME.json; an empty dictionary if it does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/NAME.json; each `Stats` becomes a dictionary."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=asdict)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Return the lines of a Markdown table; the last line ends with a line break."""
    first, *rest = ("| " + " | ".join(map(str, line)) + " |\n" for line in [head, *rows])
    return "".join([first, "|---" * len(head) + "|\n", *rest])


def fill_table(page: Path, name: str, table: str) -> None:
    """Replace the text between `<!-- table: NAME -->` of a page and the next `END` by `table`.

    Raises:
        ValueError: the page has no such markers.
    """
    mark = f"<!-- table: {name} -->"
    before, found, after = page.read_text(encoding="utf-8").partition(mark)
    if not found or END not in after:
        raise ValueError(f"{page} has no table between {mark!r} and {END!r}")
    page.write_text(f"{before}{mark}\n{table}{END}{after.split(END, 1)[1]}", encoding="utf-8")


@contextmanager
def _chart(path: Path, height: float) -> Iterator[Figure]:
    """A figure, 8 inches wide, that is saved to `path` at the end."""
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, dpi=120)


@contextmanager
def line_chart(path: Path, *, xlabel: str, ylabel: str) -> Iterator[Axes]:
    """Axes with a grid and a legend; the chart is saved to `path` at the end."""
    with _chart(path, 3.7) as figure:
        axes = figure.add_subplot()
        yield axes
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        axes.legend()


def bar_chart(path: Path, panels: Mapping[str, Mapping[str, Stats]], *, xlabel: str) -> None:
    """Save a chart of medians with their range: one panel per title, its first bar on top, ours in orange."""
    num_bars = sum(map(len, panels.values()))
    with _chart(path, 0.6 + 0.35 * num_bars + 0.3 * len(panels)) as figure:
        ratios = [len(bars) for bars in panels.values()]
        column = figure.subplots(len(panels), squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (title, bars) in zip(column, panels.items(), strict=True):
            for at, (name, stats) in enumerate(reversed(bars.items())):
                error = [[stats.median - stats.min], [stats.max - stats.median]]
                color = "tab:orange" if name.startswith("ours") else "tab:gray"
                axes.barh(at, stats.median, xerr=error, color=color, height=0.7, ecolor="black", capsize=3)
                text = {"textcoords": "offset points", "va": "center"}
                axes.annotate(f"{stats.median:,.0f}", (stats.max, at), (4, 0), **text)
            axes.set_yticks(range(len(bars)), list(bars)[::-1])
            axes.set_title(title, loc="left", fontsize=10)
            axes.margins(x=0.12)
            axes.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel(xlabel)

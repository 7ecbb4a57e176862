"""An entry of the speedrun: a folder with entry.yaml, the files of its command, and a log for each seed."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mpmath
import yaml
from speedrun.editions import Edition

from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import file_sha256

ENTRY_FILE = "entry.yaml"
MODELS = "models"
"""Folder of the trained models in an entry; git ignores it."""
MIN_SEEDS = 3
MAX_P_VALUE = 0.01
SEED = "SEED"
"""Stands for the seed in the command."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Figures over the seeds."""

    seconds: float
    """Mean wall-clock time, from the start of the process to its end."""
    bits_per_byte: float
    """Mean."""
    distance: float
    """Mean of what is compared with the target."""
    p_value: float
    """Of a one-sided t-test that the mean distance is below the target."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Contents of entry.yaml."""

    path: Path
    name: str
    author: str
    edition: str
    device: str
    """`cpu`: two cores; `gpu`: one GPU."""
    command: str
    """Training command; it runs in a folder with train.jsonl and the files of the entry."""
    model: str
    """Model folder that the command writes."""
    metrics: str | None = None
    """JSON Lines that the command writes, with step, tokens and seconds; null for none."""
    seeds: list[int]
    date: str | None = None
    hardware: str | None = None
    commit: str | None = None
    results: Results | None = None

    def log(self, seed: int) -> Path:
        """Return the file of the log of a seed."""
        return self.path / f"seed_{seed}.json"

    def model_folder(self, seed: int) -> Path:
        """Return the folder of the model of a seed, which may be absent."""
        return self.path / MODELS / f"seed_{seed}"

    def files(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the command may read."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            is_log = name.startswith("seed_") and name.endswith(".json")
            if path.is_file() and name != ENTRY_FILE and not is_log and not name.startswith(f"{MODELS}/"):
                found[name] = file_sha256(path)
        return found


@dataclass(frozen=True, kw_only=True)
class SeedLog:
    """What happened in one run, and the score of its model."""

    seed: int
    command: str
    commit: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    train_sha256: str
    validation_sha256: str
    files: Mapping[str, str]
    """SHA-256 of the files of the entry."""
    seconds: float
    steps: Sequence[Sequence[float]]
    """[step, training tokens, seconds], as the run wrote them."""
    lines: Sequence[Sequence[Any]]
    """[seconds, text] of each printed line."""
    weights_sha256: str
    scores: Mapping[str, Any]
    sum: str = field(default="", compare=False)
    """SHA-256 of all the rest."""

    def expected_sum(self) -> str:
        """Return the sum of the contents."""
        values = {name: value for name, value in asdict(self).items() if name != "sum"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the log with its sum, one item a line."""
        values = asdict(replace(self, sum=self.expected_sum()))
        rows = [
            f"{json.dumps(name)}: {json.dumps(value)}"
            if name not in ("steps", "lines")
            else f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]"
            for name, value in values.items()
        ]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def read_entry(path: Path) -> Entry:
    """Return the entry in a folder.

    Raises:
        UserError: entry.yaml is missing, is no YAML, or has other keys than those of `Entry`.
    """
    file = path / ENTRY_FILE
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        results = values.pop("results", None)
        entry = Entry(path=path, results=Results(**results) if results else None, **values)
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not an entry ({reason}); begin with the template") from error
    if entry.device not in ("cpu", "gpu"):
        raise UserError(f"{file}: device ({entry.device}): must be cpu or gpu")
    if SEED not in entry.command.split() or len(set(entry.seeds)) < len(entry.seeds):
        raise UserError(f"{file}: the command must have the word {SEED}, and seeds different values")
    return entry


def write_entry(entry: Entry) -> None:
    """Write entry.yaml."""
    values = asdict(entry)
    del values["path"]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    (entry.path / ENTRY_FILE).write_text(text, encoding="utf-8")


def read_log(path: Path) -> SeedLog:
    """Return a log.

    Raises:
        UserError: it is missing or of another form.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return SeedLog(**{field.name: values[field.name] for field in fields(SeedLog)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a log of a run ({error}); make it with run.py") from error


def summarize(edition: Edition, logs: Sequence[SeedLog]) -> Results:
    """Return the figures over the seeds; with fewer than two the p-value is 1."""
    distances = [edition.distance(log.scores) for log in logs]
    return Results(
        seconds=round(statistics.fmean(log.seconds for log in logs), 2),
        bits_per_byte=round(statistics.fmean(log.scores["bits_per_byte"] for log in logs), 5),
        distance=round(statistics.fmean(distances), 5),
        p_value=float(f"{p_value(distances, edition.target):.2g}"),
    )


def p_value(values: Sequence[float], target: float) -> float:
    """Return the p-value of the one-sided t-test that the mean of `values` is below `target`."""
    if len(values) < 2:
        return 1.0
    difference = statistics.fmean(values) - target
    error = statistics.stdev(values) / len(values) ** 0.5
    if error == 0:
        return 0.0 if difference < 0 else 1.0
    return student_below(difference / error, len(values) - 1)


def student_below(t: float, freedom: int) -> float:
    """Return the probability that Student's t with `freedom` degrees of freedom is below `t`.

    mpmath comes with torch.
    """
    tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
    return float(tail if t < 0 else 1 - tail)

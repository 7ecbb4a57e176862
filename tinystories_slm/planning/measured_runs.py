"""Runs that a law is fitted to: those of a sweep.json, or of another file of the same form."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinystories_slm.errors import UserError
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.planning.law import BUILTIN, STORIES
from tinystories_slm.runs.run_dir import RunDir, read_json_object

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class MeasuredRun:
    """A trained run and its loss."""

    num_parameters: int
    """Without embeddings."""
    num_tokens: int
    """Training tokens."""
    bits_per_byte: float
    """Of held-out text."""
    vocab_size: int
    bytes_per_token: float
    unique_tokens: int | None = None
    """Tokens of the training stories; null if no story was read twice."""
    entropy: float | None = None
    """Bits per byte of the scored text, if the grammar generates it."""

    @property
    def budget(self) -> float:
        """Parameters times tokens: a sixth of the FLOPs (Kaplan et al., arXiv 2001.08361)."""
        return float(self.num_parameters) * self.num_tokens

    @property
    def num_epochs(self) -> float:
        """Readings of each story; at most 1 if none was repeated."""
        return self.num_tokens / self.unique_tokens if self.unique_tokens else 1.0


def read_runs(paths: Sequence[Path]) -> dict[str, list[MeasuredRun]]:
    """Return the finished runs of sweep folders, or of files like sweep.json, by the name of their law.

    Raises:
        UserError: a file is missing or of another form, or no run is finished.
    """
    found: dict[str, list[MeasuredRun]] = {}
    for path in paths:
        for run in _read_file(_file_of(path)):
            found.setdefault(STORIES if run.entropy is None else BUILTIN, []).append(run)
    if not found:
        raise UserError(f"runs ({', '.join(map(str, paths))}): has no finished run; run the sweep first")
    return found


def known_entropy(runs: Sequence[MeasuredRun]) -> float | None:
    """Return the entropy of the scored text, which is the law's E; None if it is unknown."""
    known = [run.entropy for run in runs if run.entropy is not None]
    return statistics.fmean(known) if known else None


def describe_sources(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return name, hash and versions of each file of runs, and the machine where they trained."""
    sources = []
    for path in paths:
        file = _file_of(path)
        values = read_json_object(file)
        machine, versions = values.get("machine"), values.get("versions")
        if machine is None and values["runs"]:
            environment = RunDir(file.parent / str(values["runs"][0].get("name"))).read_environment()
            machine, versions = environment.get("hardware"), environment.get("packages")
        sources.append(
            {"runs": str(path), "sha256": file_sha256(file), "machine": machine, "versions": versions}
        )
    return sources


def _file_of(path: Path) -> Path:
    file = path / SWEEP_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"runs ({path}): must be the output_dir of a sweep, or a file like its {SWEEP_FILE}; run "
            "scripts/sweep.py, or set --sweep"
        )
    return file


def _read_file(path: Path) -> list[MeasuredRun]:
    rows = read_json_object(path, {"runs": list}).get("runs", [])
    try:
        return [_run_of(row) for row in rows if row.get("metrics") and not row.get("is_twin")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"runs ({path}): has a run without {error}, of an earlier version; write the table again with "
            "scripts/sweep.py --table"
        ) from error


def _run_of(row: Mapping[str, Any]) -> MeasuredRun:
    return MeasuredRun(
        num_parameters=int(row["num_non_embedding_parameters"]),
        num_tokens=int(row["tokens"]),
        bits_per_byte=float(row["metrics"]["bits_per_byte"]["value"]),
        vocab_size=int(row["vocab_size"]),
        bytes_per_token=float(row["bytes_per_token"]),
        unique_tokens=row["unique_tokens"],
        entropy=row["entropy_bits_per_byte"],
    )

"""Figures of a sweep: one row for each run, and the combinations over seeds with their differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.errors import UserError
from tinystories_slm.report_card.sections import measure_names
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.sweeps.state import RunState

EVALUATION_METRICS = ("bits_per_byte", "text_bits_per_byte", "loss", "perplexity", "accuracy")


@dataclass(frozen=True)
class Measured:
    """A metric of one run, with its 95% interval over stories if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SweepRow:
    """Figures of one run; those of a run that is not finished are null."""

    name: str
    labels: Mapping[str, str]
    seed: int
    state: str
    is_finished: bool
    is_twin: bool
    baseline: str | None
    num_parameters: int | None = None
    num_non_embedding_parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    """Training tokens."""
    vocab_size: int | None = None
    unique_tokens: int | None = None
    """Tokens of the training stories; more training tokens are repetitions."""
    bytes_per_token: float | None = None
    """Of the training stories."""
    entropy_bits_per_byte: float | None = None
    """Of the scored stories, if the grammar generates them."""
    metrics: Mapping[str, Measured] | None = None
    scored: tuple[Any, ...] | None = None
    """What identifies the scored stories: data, number of stories and bytes."""


@dataclass(frozen=True)
class Combination:
    """Runs that differ in their seed alone."""

    labels: Mapping[str, str]
    rows: Sequence[SweepRow]
    differences: Sequence[float]
    """Of the first metric, run minus baseline, for each seed that both have."""

    def values(self, metric: str) -> list[float]:
        """Return the values of the finished runs."""
        return [row.metrics[metric].value for row in self.rows if row.metrics and metric in row.metrics]

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds; NaN without a finished run."""
        values = self.values(metric)
        return statistics.fmean(values) if values else math.nan


def check_metrics(args: SweepArgs) -> None:
    """Check the names of `metrics`.

    Raises:
        UserError: one is unknown, or needs a report card that the sweep does not write.
    """
    of_card = measure_names()
    for name in args.metrics:
        if name in EVALUATION_METRICS:
            continue
        if name not in of_card:
            known = ", ".join([*EVALUATION_METRICS, *of_card])
            raise UserError(f"metrics ({name}): must be one of {known}")
        if args.report_card is False:
            raise UserError(f"metrics ({name}): is of the report card; add report_card: true")


def read_rows(args: SweepArgs, states: Sequence[RunState]) -> list[SweepRow]:
    """Return a row for each run."""
    return [_read_row(args, state) for state in states]


def combine(args: SweepArgs, rows: Sequence[SweepRow]) -> list[Combination]:
    """Return the combinations in the order of the rows; a twin is no combination of its own."""
    by_name = {row.name: row for row in rows}
    grouped: dict[tuple[tuple[str, str], ...], list[SweepRow]] = {}
    for row in rows:
        if not row.is_twin:
            grouped.setdefault(tuple(row.labels.items()), []).append(row)
    metric = args.metrics[0]
    combinations = []
    for labels, own in grouped.items():
        pairs = [(row, by_name.get(row.baseline or "")) for row in own]
        values = [
            row.metrics[metric].value - other.metrics[metric].value
            for row, other in pairs
            if other and row.metrics and other.metrics and metric in row.metrics and metric in other.metrics
        ]
        combinations.append(Combination(dict(labels), own, values))
    return combinations


def _read_row(args: SweepArgs, state: RunState) -> SweepRow:
    run, scores = state.run, state.evaluation
    row = {
        "name": run.name,
        "labels": run.labels,
        "seed": run.seed,
        "state": state.text(args),
        "is_finished": state.is_complete(args),
        "is_twin": run.is_twin,
        "baseline": run.baseline,
    }
    if not state.trained or scores is None:
        return SweepRow(**row)
    last = RunDir(state.path).read_metrics()[-1]
    return SweepRow(
        **row,
        **_read_data(RunDir(state.path)),
        entropy_bits_per_byte=scores.get("entropy_bits_per_byte"),
        num_parameters=scores["num_parameters"],
        num_non_embedding_parameters=scores["num_non_embedding_parameters"],
        steps=last["step"],
        tokens=last["tokens"],
        metrics=_read_metrics(args, state),
        scored=(scores["data"], scores["revision"], scores["num_stories"], scores["num_bytes"]),
    )


def _read_data(run_dir: RunDir) -> dict[str, Any]:
    """Return the vocabulary and the size of the training stories of a run; that of a stream is not known."""
    manifest = run_dir.load_manifest()
    if manifest is None:
        return {}
    train = manifest.splits["train"]
    return {
        "vocab_size": manifest.vocab_size,
        "unique_tokens": None if manifest.provenance.streaming else train["num_tokens"],
        "bytes_per_token": train["num_bytes"] / train["num_tokens"],
    }


def _read_metrics(args: SweepArgs, state: RunState) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for name in args.metrics:
        if name in EVALUATION_METRICS:
            if (value := state.evaluation.get(name)) is not None:
                found[name] = Measured(value, *(state.evaluation["intervals"].get(name) or ()))
        elif state.card is not None and (measured := _of_card(state.card, name)):
            found[name] = measured
    return found


def _of_card(card: Mapping[str, Any], name: str) -> Measured | None:
    own = card["sets"][0]["name"]
    for measure in card["measures"]:
        if measure["name"] == name and (estimate := measure["by_set"][own]):
            return Measured(estimate["value"], estimate["low"], estimate["high"])
    return None

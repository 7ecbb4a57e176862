"""Table of a sweep as Markdown, CSV and JSON."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tinystories_slm.config.command_args.sweep import SweepArgs
from tinystories_slm.evaluation.table import format_interval, markdown_row
from tinystories_slm.sweeps.grid import Axis
from tinystories_slm.sweeps.results import Combination, Measured, SweepRow
from tinystories_slm.sweeps.scaling import SweepLaw, describe_law, law_record

_COUNTS = ("num_parameters", "num_non_embedding_parameters", "tokens", "steps")
_COUNT_NAMES = ("parameters", "without embeddings", "tokens", "steps")


def markdown_page(
    args: SweepArgs,
    axes: Sequence[Axis],
    rows: Sequence[SweepRow],
    combinations: Sequence[Combination],
    laws: Sequence[SweepLaw],
) -> str:
    """Return the table of the combinations, if there are several seeds or differences, that of the runs, and
    the laws.
    """
    parts = [_scored_lines(rows)]
    if len(args.seeds) > 1 or any(one.differences for one in combinations):
        parts.append(_combination_table(args, axes, combinations))
    parts.append(_run_table(args, axes, rows))
    parts.append([describe_law(one, args.metrics[0]) for one in laws])
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def csv_rows(args: SweepArgs, axes: Sequence[Axis], rows: Sequence[SweepRow]) -> str:
    """Return one row for each run; each metric is followed by the bounds of its interval."""
    text = io.StringIO()
    metrics = [column for name in args.metrics for column in (name, f"{name}_low", f"{name}_high")]
    columns = ["name", *(axis.name for axis in axes), "seed", "state", *_COUNTS, *metrics]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {"name": row.name, **row.labels, "seed": row.seed, "state": row.state}
        values |= {name: getattr(row, name) for name in _COUNTS}
        for name, measured in (row.metrics or {}).items():
            values |= {name: measured.value, f"{name}_low": measured.low, f"{name}_high": measured.high}
        writer.writerow(values)
    return text.getvalue()


def json_record(
    args: SweepArgs,
    axes: Sequence[Axis],
    rows: Sequence[SweepRow],
    combinations: Sequence[Combination],
    laws: Sequence[SweepLaw],
) -> dict[str, Any]:
    """Return everything that the table and the plots show, as JSON types."""
    return {
        "metrics": list(args.metrics),
        "baseline": args.baseline or None,
        "axes": {
            axis.name: {label: dict(options) for label, options in axis.options.items()} for axis in axes
        },
        "runs": [asdict(row) for row in rows],
        "combinations": [_combination_record(args, one) for one in combinations],
        "power_laws": [law_record(one) for one in laws],
    }


def _combination_record(args: SweepArgs, one: Combination) -> dict[str, Any]:
    values = {name: one.values(name) for name in args.metrics}
    return {
        "labels": dict(one.labels),
        "means": {name: one.mean(name) for name, own in values.items() if own},
        "deviations": {name: statistics.stdev(own) for name, own in values.items() if len(own) > 1},
        "differences": list(one.differences),
    }


def _scored_lines(rows: Sequence[SweepRow]) -> list[str]:
    finished = sum(row.is_finished for row in rows)
    lines = [f"{finished} of {len(rows)} runs are finished."]
    scored = {row.scored for row in rows if row.scored}
    if len(scored) == 1:
        data, _, num_stories, num_bytes = scored.pop()
        lines.append(f"Scored: {num_stories:,} stories, {num_bytes:,} bytes of {data}.")
    elif scored:
        lines.append("Not all runs are scored on the same stories: compare their losses with care.")
    lines.append(
        "In brackets: 95% intervals over the stories; they do not include the variation of training."
    )
    return lines


def _run_table(args: SweepArgs, axes: Sequence[Axis], rows: Sequence[SweepRow]) -> list[str]:
    head = ["run", *(axis.name for axis in axes), "seed", *_COUNT_NAMES, *map(_title, args.metrics), "state"]
    lines = [markdown_row(head), "|---" * len(head) + "|"]
    for row in rows:
        counts = [getattr(row, name) for name in _COUNTS]
        cells = [row.name, *(row.labels[axis.name] for axis in axes), str(row.seed)]
        cells += ["" if count is None else f"{count:,}" for count in counts]
        cells += [_with_bounds((row.metrics or {}).get(name)) for name in args.metrics]
        lines.append(markdown_row([*cells, row.state]))
    return lines


def _combination_table(
    args: SweepArgs, axes: Sequence[Axis], combinations: Sequence[Combination]
) -> list[str]:
    metric = args.metrics[0]
    has_baseline = any(one.differences for one in combinations)
    difference = [f"{_title(metric)} minus the baseline's"] if has_baseline else []
    head = [*(axis.name for axis in axes), "seeds", *map(_title, args.metrics), *difference]
    lines = [markdown_row(head), "|---" * len(head) + "|"]
    shown = combinations
    if has_baseline:
        shown = sorted(combinations, key=lambda one: statistics.fmean(one.differences or [0.0]))
    for one in shown:
        cells = [one.labels[axis.name] for axis in axes] + [str(len(one.values(metric)))]
        cells += [_mean_and_deviation(one.values(name)) for name in args.metrics]
        cells += [_mean_and_deviation(one.differences, sign="+")] * has_baseline
        lines.append(markdown_row(cells))
    deviation = "± is the standard deviation over the seeds"
    paired = "; the difference is between runs with the same seed" if has_baseline else ""
    return [*lines, "", f"{deviation}{paired}."]


def _title(metric: str) -> str:
    return metric.replace("_", " ")


def _with_bounds(measured: Measured | None) -> str:
    if measured is None:
        return ""
    interval = None if measured.low is None else (measured.low, measured.high)
    return format_interval(measured.value, interval, "{:.4f}")


def _mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation}"

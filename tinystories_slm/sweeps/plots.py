"""Heat map and curve of a sweep; what they show is computed apart from the drawing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from tinystories_slm.evaluation.plot import use_log_counts
from tinystories_slm.io.atomic import atomic_write
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.sweeps.grid import VARIANT, Axis
from tinystories_slm.sweeps.results import Combination, SweepRow
from tinystories_slm.sweeps.scaling import SweepLaw

_MAX_PANELS = 6


@dataclass(frozen=True)
class HeatMap:
    """Means over the seeds for the labels of two axes."""

    title: str
    """Labels of the other axes."""
    rows: Axis
    columns: Axis
    values: np.ndarray
    """(rows, columns); NaN where no run is finished."""


def heat_maps(axes: Sequence[Axis], combinations: Sequence[Combination], metric: str) -> list[HeatMap]:
    """Return a map over the first two grid axes for each combination of labels of the other axes.

    Empty without two grid axes of several labels.
    """
    long = [axis for axis in axes if axis.name != VARIANT and len(axis.options) > 1]
    if len(long) < 2:
        return []
    columns, rows = long[:2]
    others = [axis for axis in axes if axis not in (rows, columns)]
    means = {tuple(sorted(one.labels.items())): one.mean(metric) for one in combinations}

    def value(labels: Mapping[str, str]) -> float:
        return means.get(tuple(sorted(labels.items())), math.nan)

    maps = []
    for chosen in product(*(axis.options for axis in others)):
        fixed = dict(zip([axis.name for axis in others], chosen, strict=True))
        values = [
            [value(fixed | {rows.name: row, columns.name: column}) for column in columns.options]
            for row in rows.options
        ]
        shown = {name: label for name, label in fixed.items() if len(_options(others, name)) > 1}
        title = ", ".join(label if name == VARIANT else f"{name} {label}" for name, label in shown.items())
        maps.append(HeatMap(title, rows, columns, np.array(values)))
    return maps


def _options(axes: Sequence[Axis], name: str) -> Mapping[str, Mapping[str, object]]:
    return next(axis.options for axis in axes if axis.name == name)


def plot_heat_maps(maps: Sequence[HeatMap], metric: str, path: Path) -> None:
    """Write the maps as a PNG, side by side; at most `_MAX_PANELS`.

    Raises:
        UserError: the file cannot be written.
    """
    from tinystories_slm.runs.figures import Figure

    shown = maps[:_MAX_PANELS]
    num_rows, num_columns = shown[0].values.shape
    size = (1.5 + max(2.5, 0.95 * num_columns) * len(shown), 1.5 + max(1.8, 0.6 * num_rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    finite = np.concatenate([one.values[np.isfinite(one.values)] for one in shown])
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    for axes, one in zip(panels, shown, strict=True):
        image = axes.imshow(one.values, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
        axes.set_xticks(range(num_columns), list(one.columns.options))
        axes.set_yticks(range(num_rows), list(one.rows.options))
        axes.set(xlabel=one.columns.name.replace("_", " "), title=one.title)
        for (row, column), value in np.ndenumerate(one.values):
            is_dark = math.isfinite(value) and value < (low + high) / 2
            text = f"{value:.3f}" if math.isfinite(value) else "missing"
            color = "white" if is_dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    panels[0].set_ylabel(shown[0].rows.name.replace("_", " "))
    figure.colorbar(image, ax=list(panels), label=metric.replace("_", " "))
    _save(figure, path)


def plot_curve(rows: Sequence[SweepRow], laws: Sequence[SweepLaw], metric: str, path: Path) -> None:
    """Write a PNG of the metric against parameters without embeddings, with the law over parameters alone.

    Bars are the intervals over stories, and the band that of a new run under the law.

    Raises:
        UserError: the file cannot be written.
    """
    from tinystories_slm.runs.figures import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[SweepRow]] = {}
    for row in rows:
        if row.metrics and metric in row.metrics and not row.is_twin:
            groups.setdefault(row.labels.get(VARIANT, ""), []).append(row)
    by_variant = {one.variant or "": one.law for one in laws}
    for index, (variant, own) in enumerate(groups.items()):
        x = [row.num_non_embedding_parameters for row in own]
        measured = [row.metrics[metric] for row in own]
        y = [one.value for one in measured]
        bars = [[one.value - (one.low or one.value) for one in measured]]
        bars.append([(one.high or one.value) - one.value for one in measured])
        color = f"C{index % 10}"
        axes.errorbar(
            x, y, yerr=np.maximum(bars, 0), fmt="o", capsize=3, color=color, label=variant or "runs"
        )
        law = by_variant.get(variant)
        if law is not None and law.terms == ("parameters",):
            sizes = np.geomspace(min(x) / 1.5, 3 * max(x), 60)
            found = [law.predict(parameters=size) for size in sizes]
            axes.plot(sizes, [one.value for one in found], color=color, label=f"power law {variant}".strip())
            low, high = [one.low for one in found], [one.high for one in found]
            axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    use_log_counts(axes, [row.num_non_embedding_parameters for own in groups.values() for row in own])
    axes.set(xlabel="parameters without embeddings", ylabel=metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    with translate_write_errors("output_dir", path), atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)

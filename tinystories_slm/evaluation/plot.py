"""Plot of quality against the number of parameters."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories_slm.io.atomic import atomic_write
from tinystories_slm.io.file_errors import translate_write_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)


def plot_quality(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG or SVG (by the suffix of `path`) of bits per byte against parameters without embeddings.

    `results` are scores as `evaluate` returns them; bars show their 95 % intervals. A model without bits per
    byte is left out, with a warning.

    Raises:
        UserError: the file cannot be written.
    """
    # matplotlib takes a second to import.
    from tinystories_slm.runs.figures import Figure

    shown = [scores for scores in results if "text_bits_per_byte" in scores]
    for scores in results:
        if scores not in shown:
            logger.warning("%s has no bits per byte, so the plot leaves it out", scores["model"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for scores in shown:
        x, y = scores["num_non_embedding_parameters"], scores["text_bits_per_byte"]
        low, high = scores["intervals"]["text_bits_per_byte"] or (y, y)
        axes.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", capsize=3)
        axes.annotate(scores["model"], (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set(xlabel="parameters without embeddings", ylabel="bits per byte of the text (lower is better)")
    use_log_counts(axes, [scores["num_non_embedding_parameters"] for scores in shown])
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    with translate_write_errors("plot", path), atomic_write(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)


def use_log_counts(axes: "Axes", counts: Sequence[int]) -> None:
    """Make the x axis logarithmic around `counts`, such as numbers of parameters, with ticks such as 500k."""
    from tinystories_slm.runs.figures import LogLocator, NullLocator

    sizes = [max(1, count) for count in counts] or [1]
    # A factor of 3 on both sides, so that models of nearly one size do not look far apart.
    axes.set(xscale="log", xlim=(min(sizes) / 3, 3 * max(sizes)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda count, _: _format_count(count))


def _format_count(count: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{suffix}"
    return f"{count:g}"

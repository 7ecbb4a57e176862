"""Plot of quality against the number of parameters."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinystories_slm.io.atomic import atomic_write
from tinystories_slm.io.file_errors import translate_write_errors

logger = logging.getLogger(__name__)


def plot_quality(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG or SVG (by the suffix of `path`) of bits per byte against parameters without embeddings.

    `results` are scores as `evaluate` returns them; bars show their 95 % intervals. A model without bits per
    byte is left out, with a warning.

    Raises:
        UserError: the file cannot be written.
    """
    from tinystories_slm.runs.figures import Figure  # matplotlib takes a second to import

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
    axes.set(xlabel="parameters without embeddings", ylabel="bits per byte of the text")
    if shown:
        axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3)
    with translate_write_errors("plot", path), atomic_write(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)

"""Render report.html of prepared stories: one page that loads nothing, for screen and phone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from tinystories_slm.runs.chart import Curve, render_chart
from tinystories_slm.runs.page import load_template

if TYPE_CHECKING:
    from tinystories_slm.data_report.report import DataReport
    from tinystories_slm.data_report.vocabularies import Vocabulary


def render_page(report: DataReport) -> str:
    """Return the page."""
    charts = {f"{name}_lengths": _length_chart(report, name) for name in ("words", "tokens")}
    charts |= {
        "wide_growth": _growth_chart(report, width=1060, height=300),
        "narrow_growth": _growth_chart(report, width=400, height=250),
        "compression": _vocabulary_chart(report.vocabularies, "Bytes per token", "bytes_per_token", "{:g}"),
        "share": _vocabulary_chart(
            report.vocabularies, "Share of the embedding", "embedding_share", "{:.0%}"
        ),
    }
    return load_template("data_report.html.jinja", "tinystories_slm.data_report").render(
        report=report,
        charts={name: Markup(svg) for name, svg in charts.items()},
        num_stories=sum(counts["num_stories"] for counts in report.splits.values()),
        num_bytes=sum(counts["num_bytes"] for counts in report.splits.values()),
        configured=next((one for one in report.vocabularies if one["is_configured"]), None),
    )


def _length_chart(report: DataReport, unit: str) -> str:
    curves = [
        Curve({"train": "training"}.get(split, split), points)
        for split, points in report.histograms[unit].items()
    ]
    return render_chart(
        f"stories by length in {unit}",
        curves,
        tick="{:.0%}".format,
        x_label=f"{unit} in a story",
        x_name=unit,
    )


def _growth_chart(report: DataReport, *, width: int, height: int) -> str:
    return render_chart(
        "distinct words",
        [Curve("distinct words", report.growth)],
        width=width,
        height=height,
        tick="{:,.0f}".format,
        x_label="words read",
        x_name="words read:",
    )


def _vocabulary_chart(vocabularies: list[Vocabulary], title: str, key: str, tick: str) -> str:
    points = [(one["vocab_size"], one[key]) for one in vocabularies]
    sizes = [size for size, _ in points]
    return render_chart(
        title,
        [Curve(title.lower(), points, markers=True)],
        tick=tick.format,
        x_label="entries of the vocabulary",
        x_name="vocabulary of",
        x_values=sizes,
    )

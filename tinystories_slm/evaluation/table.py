"""Scores of models as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from tinystories_slm.evaluation.breakdown import LENGTH_EDGES, POSITION_EDGES

Scores = dict[str, Any]
"""Scores of one model, as `evaluate` returns them."""

_COLUMNS = (
    "model", "bits per byte", "text alone", "difference from the first", "loss", "perplexity", "accuracy",
    "start", "end", "parameters", "without embeddings", "tokens",
)  # fmt: skip
_INTERVALS = ("loss", "perplexity", "accuracy", "bits_per_byte", "text_bits_per_byte", "difference")
_CSV_COLUMNS = (
    "model", "num_parameters", "num_non_embedding_parameters", *_INTERVALS, "lost_share", "start", "end",
    "num_stories", "num_tokens", "num_bytes", "num_training_stories", "split", "data", "weights_sha256",
)  # fmt: skip


def markdown_report(results: Sequence[Scores]) -> str:
    """Return the table of all models, by position and by length too, and which stories were scored."""
    shared = results[0]
    lines = [
        markdown_row(_COLUMNS),
        "|---" * len(_COLUMNS) + "|",
        *(markdown_row(_cells(scores)) for scores in results),
        "",
        f"Scored: {format_stories(shared)}, {shared['num_bytes']:,} bytes of {shared['data']}.",
        f"Selection: {shared['selection']}.",
        f"Protocol: {shared['protocol']}.",
        "In brackets: 95% intervals, by the bootstrap over stories. `text alone`: bits per byte without the "
        "end token; the difference is of these, on the same stories.",
        *(f"End of {scores['model']}: {scores['end_reason']}." for scores in results),
        "",
        *_bucket_table(results, "by_position", POSITION_EDGES, "first byte of the token in the story"),
        "",
        *_bucket_table(results, "by_length", LENGTH_EDGES, "bytes of the story"),
    ]
    return "\n".join(lines)


def csv_table(results: Sequence[Scores]) -> str:
    """Return one row per model; each metric is followed by the bounds of its interval."""
    text = io.StringIO()
    columns = [
        column
        for name in _CSV_COLUMNS
        for column in ([name, f"{name}_low", f"{name}_high"] if name in _INTERVALS else [name])
    ]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for scores in results:
        bounds = {
            f"{name}_{side}": bound
            for name, interval in scores["intervals"].items()
            for side, bound in zip(("low", "high"), interval or (), strict=False)
        }
        writer.writerow(scores | bounds)
    return text.getvalue()


def format_stories(scores: Scores) -> str:
    """Return how many stories were scored, of how many, and how many of them the model was trained on."""
    if "num_split_stories" not in scores:  # of an earlier version
        return f"{scores['num_stories']:,} stories"
    text = f"{scores['num_stories']:,} of {scores['num_split_stories']:,} stories"
    if scores["num_source_stories"] > scores["num_split_stories"]:
        text += f" held out of {scores['num_source_stories']:,}"
    if scores["num_training_stories"]:
        text += f" ({scores['num_training_stories']:,} trained on)"
    return text


def bucket_lines(scores: Scores) -> list[str]:
    """Return the scores of one model by position and by length, one line each."""
    lines = []
    for key, edges in (("by_position", POSITION_EDGES), ("by_length", LENGTH_EDGES)):
        name, unit = _bucket_metric([scores])
        values = [
            f"{_bucket_label(first, edges)}: {value}"
            for first, value in zip(edges, _bucket_values(scores, key, edges, name), strict=True)
            if value
        ]
        lines.append(f"{key.replace('_', ' '):<14} {unit}, at bytes {', '.join(values)}")
    return lines


def markdown_row(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(scores: Scores) -> list[str]:
    lossy = f"lossy: {scores['lost_share']:.1%} of bytes lost" if "lost_share" in scores else ""
    return [
        scores["model"],
        lossy or _with_interval(scores, "bits_per_byte", "{:.3f}"),
        _with_interval(scores, "text_bits_per_byte", "{:.3f}"),
        _with_interval(scores, "difference", "{:+.3f}"),
        _with_interval(scores, "loss", "{:.3f}"),
        f"{scores['perplexity']:.2f}",
        _with_interval(scores, "accuracy", "{:.1%}"),
        f"`{scores['start']}`" if scores["start"] else "none",
        f"`{scores['end']}`" if scores["end"] else "none",
        f"{scores['num_parameters']:,}",
        f"{scores['num_non_embedding_parameters']:,}",
        f"{scores['num_tokens']:,}",
    ]


def _with_interval(scores: Scores, name: str, form: str) -> str:
    return format_interval(scores[name], scores["intervals"].get(name), form) if name in scores else ""


def format_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    """Return the value with its interval in brackets."""
    bounds = f" [{', '.join(form.format(bound) for bound in interval)}]" if interval else ""
    return form.format(value) + bounds


def _bucket_table(results: Sequence[Scores], key: str, edges: Sequence[int], label: str) -> list[str]:
    """Return the lines of a table with a column for each bucket that any model has."""
    name, unit = _bucket_metric(results)
    rows = [_bucket_values(scores, key, edges, name) for scores in results]
    shown = [i for i in range(len(edges)) if any(row[i] for row in rows)]
    return [
        f"{unit.capitalize()} of the text, by {label}:",
        "",
        markdown_row(["model", *(_bucket_label(edges[i], edges) for i in shown)]),
        "|---" * (len(shown) + 1) + "|",
        *(
            markdown_row([scores["model"], *(row[i] for i in shown)])
            for scores, row in zip(results, rows, strict=True)
        ),
    ]


def _bucket_metric(results: Sequence[Scores]) -> tuple[str, str]:
    """Return key and name of the metric in buckets: nats per token if no model has bits per byte."""
    if any("bits_per_byte" in scores for scores in results):
        return "bits_per_byte", "bits per byte"
    return "loss", "nats per token"


def _bucket_values(scores: Scores, key: str, edges: Sequence[int], name: str) -> list[str]:
    found = {bucket["from_byte"]: f"{bucket[name]:.3f}" for bucket in scores[key] if name in bucket}
    return [found.get(first, "") for first in edges]


def _bucket_label(first: int, edges: Sequence[int]) -> str:
    following = [edge for edge in edges if edge > first]
    return f"{first} to {following[0] - 1}" if following else f"from {first}"

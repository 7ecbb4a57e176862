"""The page of a report card, rendered from the contents of its JSON file."""

from itertools import groupby
from typing import Any

from tinystories_slm.runs.page import load_template

_MAX_STORIES = 6


def render_page(card: dict[str, Any]) -> str:
    """Return the self-contained HTML page of `card`."""
    template = load_template("card.html.jinja", "tinystories_slm.report_card")
    *models, held_out = card["sets"]
    grammar = card.get("grammar", {})
    breaks = sorted({name for found in grammar.values() for name in found["breaks"]})
    return template.render(
        break_names=sorted(breaks, key=lambda name: -grammar[models[0]["name"]]["breaks"].get(name, 0)),
        plot_names=sorted({plot for found in grammar.values() for plot in found["by_plot"]}),
        card=card,
        models=models,
        held_out=held_out,
        sections=[
            (name, [_panel(measure, card["sets"]) for measure in measures])
            for name, measures in groupby(card["measures"], key=lambda measure: measure["section"])
        ],
        stories=[(one["name"], one["stories"][:_MAX_STORIES]) for one in models],
    )


def _panel(measure: dict[str, Any], sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a measure as one line per set: its interval in percent of the track, and its figures."""
    found = [estimate for estimate in measure["by_set"].values() if estimate]
    low = min((estimate["low"] for estimate in found), default=0.0)
    high = max((estimate["high"] for estimate in found), default=1.0)
    if measure["format"] == "share":
        # A small difference of large shares does not look large.
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    width = (high - low) or 1.0

    def percent(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - low) / width)), 1)

    def line(number: int, name: str) -> dict[str, Any]:
        estimate = measure["by_set"].get(name)
        if not estimate:
            return {"name": name, "color": number, "text": "not defined", "track": None}
        text = [_format(estimate[key], measure["format"]) for key in ("value", "low", "high")]
        return {
            "name": name,
            "color": number,
            "text": text[0],
            "interval": f"{text[1]} to {text[2]}",
            "count": estimate["count"],
            "verdict": _verdict(estimate["difference"]) if estimate.get("difference") else "",
            "track": {key: percent(estimate[key]) for key in ("value", "low", "high")},
        }

    return {
        "title": measure["title"],
        "definition": measure["definition"],
        "lines": [line(number, one["name"]) for number, one in enumerate(sets)],
    }


def _verdict(difference: dict[str, float]) -> str:
    """Return `higher` or `lower` if the interval of the difference excludes 0."""
    if difference["low"] > 0:
        return "higher"
    return "lower" if difference["high"] < 0 else ""


def _format(value: float, kind: str) -> str:
    if kind == "share":
        return f"{value:.2%}" if abs(value) < 0.0995 else f"{value:.1%}"
    if 0 < abs(value) < 0.1:
        return f"{value:.4f}"
    if abs(value) < 1:
        return f"{value:.3f}"  # ROUGE-L of 0.347 and 0.333
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"

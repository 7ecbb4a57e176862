"""Page of one story in which each token is shaded by its surprisal; it loads nothing."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tinystories_slm.runs.chart import Curve, render_chart
from tinystories_slm.runs.page import load_template

# Nats of a token with the darkest shade.
_MAX_NATS = 8.0
_MOST_SURPRISING = 10


def render_story(model: str, story: int, text: str, tokens: Sequence[dict[str, Any]]) -> str:
    """Return the page of `text`, whose scored `tokens` are rows of `surprisal.SCHEMA`."""
    shown = [token | {"text": text[token["start"] : token["end"]] or _NAMELESS} for token in tokens]
    for token in shown:
        token["shade"] = round(min(token["nats"] / _MAX_NATS, 1.0), 2)
    charts = {
        name: Markup(
            render_chart(
                "surprisal and entropy by token",
                [
                    Curve("surprisal", [(token["token"], token["nats"]) for token in tokens]),
                    Curve("entropy", [(token["token"], token["entropy"]) for token in tokens]),
                ],
                width=width,
                x_label="token of the story",
                x_name="token",
            )
        )
        for name, width in (("wide", 1060), ("narrow", 400))
    }
    nats = math.fsum(token["nats"] for token in tokens)
    return load_template("surprisal.html.jinja", "tinystories_slm.inspection").render(
        model=model,
        story=story,
        tokens=shown,
        charts=charts,
        mean_nats=nats / len(tokens),
        total_nats=nats,
        share_first=sum(token["rank"] == 1 for token in tokens) / len(tokens),
        surprising=sorted(shown, key=lambda token: -token["nats"])[:_MOST_SURPRISING],
    )


_NAMELESS = "\u2423"
"""Shown for a token without text of its own: the end token, or a part of a character."""

"""Line charts as SVG; the style sheet of the page sets the colors, for light and dark mode."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tinystories_slm.runs.figures import LogLocator, MaxNLocator

# About one point per pixel is enough; without a limit the page of a run of a million lines has 100 MB.
_MAX_POINTS = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
# Pixels; labels at a smaller distance overlap.
_MIN_TICK_DISTANCE = 15
_MIN_X_TICK_DISTANCE = 48


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `points` are (x, value) with increasing x, such as optimizer steps."""

    name: str
    points: Sequence[tuple[float, float]]
    markers: bool = False
    """Draw a dot at each point; for curves with few points."""


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Return at most `_MAX_POINTS` (last step, mean, minimum, maximum), one per group of neighbors."""
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        values = [value for _, value in group]
        groups.append((group[-1][0], math.fsum(values) / len(values), min(values), max(values)))
    return groups


def render_chart(
    label: str,
    curves: Sequence[Curve],
    *,
    width: int = 520,
    height: int = 230,
    log: bool = False,
    level: float | None = None,
    tick: Callable[[float], str] = "{:g}".format,
    x_label: str = "optimizer step",
    x_name: str = "step",
    x_values: Sequence[float] = (),
    marks: Sequence[float] = (),
) -> str:
    """Return an `<svg>` of `curves` over optimizer steps or `x_label`, with a dashed line at `level`.

    A dotted vertical line stands at each x in `marks`.

    A logarithmic chart (`log`) skips values that are not positive. With `x_values` the x axis is logarithmic
    and has these ticks. Only the tooltip, which calls x `x_name`, needs the script of the page.
    """
    sampled = [[p for p in downsample(curve.points) if not log or p[2] > 0] for curve in curves]
    lowest = [p[2] for points in sampled for p in points] + ([] if level is None else [level])
    highest = [p[3] for points in sampled for p in points] + ([] if level is None else [level])
    steps = [p[0] for points in sampled for p in points]
    y = _Scale.of(min(lowest), max(highest), log=log, first=height - _BOTTOM, last=_TOP)
    if x_values:
        x = _Scale(min(x_values) / 1.1, max(x_values) * 1.1, True, _LEFT, width - _RIGHT)
    else:
        x = _Scale(0, max(steps), False, _LEFT, width - _RIGHT)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'data-x="{escape(x_name)}">',
        *_grid(x, y, width, height, tick, x_values or x.ticks(), x_label),
    ]
    for i, (curve, points) in enumerate(zip(curves, sampled, strict=True), start=1):
        if any(high > low for _, _, low, high in points):
            edge = [(p[0], p[3]) for p in points] + [(p[0], p[2]) for p in reversed(points)]
            parts.append(f'<polygon class="band c{i}" points="{_svg_points(edge, x, y)}"/>')
        means = [(p[0], p[1]) for p in points]
        values = escape(json.dumps([[s, float(f"{v:.5g}")] for s, v in means]))
        parts.append(
            f'<polyline class="curve c{i}" data-name="{escape(curve.name)}" data-values="{values}" '
            f'points="{_svg_points(means, x, y)}"/>'
        )
        if curve.markers:
            parts += [f'<circle class="c{i}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in means]
    if level is not None:
        parts.append(_line("level", width, y(level)))
    parts += [
        f'<line class="mark" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        for at in marks
    ]
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    """Map values in [low, high] to pixels in [first, last]."""

    low: float
    high: float
    log: bool
    first: float
    last: float

    @classmethod
    def of(cls, low: float, high: float, *, log: bool, first: float, last: float) -> "_Scale":
        """Return a scale with a margin around the values `low` to `high`."""
        if log:
            return cls(low / 1.15, high * 1.15, True, first, last)
        # The axis includes zero, so that a small change does not look large.
        return cls(min(0.0, low), high * 1.05 if high > 0 else high + 1.0, False, first, last)

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (self.last - self.first) * (value - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        if self.log:
            subs = (1, 2, 3, 5) if self.high / self.low < 200 else (1,)
            found = self._inside(LogLocator(subs=subs).tick_values(self.low, self.high))
            if len(found) >= 3:
                return found
        return self._inside(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))

    def _inside(self, values: Sequence[float]) -> list[float]:
        return [float(v) for v in values if self.low <= v <= self.high and (v > 0 or not self.log)]


def _grid(
    x: _Scale,
    y: _Scale,
    width: int,
    height: int,
    tick: Callable[[float], str],
    x_ticks: Sequence[float],
    x_label: str,
) -> list[str]:
    """Return grid lines, tick labels and the axis label."""
    bottom, parts = height - _BOTTOM, []
    ticks = y.ticks()
    labeled = _spread(ticks, y, _MIN_TICK_DISTANCE)
    for value in ticks:
        parts.append(_line("grid", width, y(value)))
        if value in labeled:
            parts.append(_text(_LEFT - 7, y(value) + 4, tick(value), anchor="end"))
    whole = [value for value in x_ticks if value == int(value)]
    parts += [
        _text(x(value), bottom + 16, f"{value:,.0f}") for value in _spread(whole, x, _MIN_X_TICK_DISTANCE)
    ]
    parts.append(_line("axis", width, bottom))
    parts.append(_text((_LEFT + width - _RIGHT) / 2, height - 5, x_label))
    return parts


def _spread(ticks: Sequence[float], scale: _Scale, distance: float) -> list[float]:
    """Return the ticks whose labels do not overlap those before them."""
    labeled: list[float] = []
    for value in ticks:
        if not labeled or abs(scale(value) - scale(labeled[-1])) >= distance:
            labeled.append(value)
    return labeled


def _line(kind: str, width: int, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg_points(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

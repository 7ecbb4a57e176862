import json
import math
from xml.etree import ElementTree

import pytest

from tinystories_slm.training.watching.chart import Curve, chart, thinned


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # well-formed, or this raises


def places(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_a_straight_line_is_drawn_straight_and_inside_the_frame():
    svg = parsed(chart("x", [Curve("loss", [(0, 1.0), (50, 2.0), (100, 3.0)])], width=500, height=200))
    [line] = svg.findall("polyline")
    (x0, y0), (x1, y1), (x2, y2) = places(line)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert 0 < x0 < x2 <= 500 and 0 < y2 < y0 < 200  # upwards on paper is downwards in numbers
    assert json.loads(line.get("data-values")) == [[0, 1.0], [50, 2.0], [100, 3.0]]


def test_equal_ratios_are_equal_distances_on_a_logarithmic_scale():
    svg = parsed(chart("x", [Curve("loss", [(1, 8.0), (2, 4.0), (3, 2.0), (4, 0.0)])], log=True, level=1.0))
    heights = [y for _, y in places(svg.find("polyline"))]
    assert len(heights) == 3  # no place for the zero
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15)
    [level] = [line for line in svg.findall("line") if line.get("class") == "level"]
    assert float(level.get("y1")) - heights[2] == pytest.approx(heights[2] - heights[1], abs=0.15)


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0), (2, -1.0)]]
)
def test_a_point_or_a_flat_line_is_a_chart_too(points):
    svg = parsed(chart("x", [Curve("y", points)]))
    assert all(math.isfinite(x) and math.isfinite(y) for x, y in places(svg.find("polyline")))


def test_a_long_run_is_thinned_to_means_and_the_extremes_stay_visible():
    points = [(step, 100.0 if step == 70_000 else 1.0) for step in range(1, 100_001)]
    thin = thinned(points)
    assert len(thin) <= 400 and thin[-1][0] == 100_000
    assert max(high for *_, high in thin) == 100.0 and max(mean for _, mean, *_ in thin) < 2
    svg = parsed(chart("x", [Curve("norm", points)]))
    assert svg.find("polygon") is not None and len(chart("x", [Curve("norm", points)])) < 40_000


def test_names_are_escaped():
    svg = chart('<"&>', [Curve('<"&>', [(1, 1.0), (2, 2.0)])])
    assert parsed(svg).get("aria-label") == '<"&>' == parsed(svg).find("polyline").get("data-name")

import json
import math
from xml.etree import ElementTree

import pytest

from tinystories_slm.runs.chart import Curve, downsample, render_chart


def parse_svg(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # raises if it is not well-formed


def read_points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_straight_line_is_straight_and_inside_the_frame():
    svg = parse_svg(
        render_chart("x", [Curve("loss", [(0, 1.0), (50, 2.0), (100, 3.0)])], width=500, height=200)
    )
    [line] = svg.findall("polyline")
    (x0, y0), (x1, y1), (x2, y2) = read_points(line)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert 0 < x0 < x2 <= 500 and 0 < y2 < y0 < 200  # y decreases upwards in SVG
    assert json.loads(line.get("data-values")) == [[0, 1.0], [50, 2.0], [100, 3.0]]


def test_log_scale_maps_equal_ratios_to_equal_distances():
    svg = parse_svg(
        render_chart("x", [Curve("loss", [(1, 8.0), (2, 4.0), (3, 2.0), (4, 0.0)])], log=True, level=1.0)
    )
    heights = [y for _, y in read_points(svg.find("polyline"))]
    assert len(heights) == 3  # zero has no logarithm
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15)
    [level] = [line for line in svg.findall("line") if line.get("class") == "level"]
    assert float(level.get("y1")) - heights[2] == pytest.approx(heights[2] - heights[1], abs=0.15)


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0), (2, -1.0)]]
)
def test_chart_accepts_a_point_or_a_flat_line(points):
    svg = parse_svg(render_chart("x", [Curve("y", points)]))
    assert all(math.isfinite(x) and math.isfinite(y) for x, y in read_points(svg.find("polyline")))


def test_long_run_is_downsampled_and_keeps_its_extremes():
    points = [(step, 100.0 if step == 70_000 else 1.0) for step in range(1, 100_001)]
    groups = downsample(points)
    assert len(groups) <= 400 and groups[-1][0] == 100_000
    assert max(high for *_, high in groups) == 100.0 and max(mean for _, mean, *_ in groups) < 2
    svg = parse_svg(render_chart("x", [Curve("norm", points)]))
    assert svg.find("polygon") is not None and len(render_chart("x", [Curve("norm", points)])) < 40_000


def test_labels_are_escaped():
    svg = render_chart('<"&>', [Curve('<"&>', [(1, 1.0), (2, 2.0)])])
    assert parse_svg(svg).get("aria-label") == '<"&>' == parse_svg(svg).find("polyline").get("data-name")

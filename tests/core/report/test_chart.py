"""Charts draw every point that can be drawn, in the page's colours, and say what they leave out."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ddray.errors import ConfigError
from ddray.report.chart import COLOURS, Curve, line_chart


def svg_of(fragment: str) -> ET.Element:
    match = re.search(r"<svg.*</svg>", fragment, re.DOTALL)
    assert match is not None
    return ET.fromstring(match.group())


def runs_of(fragment: str, k: int = 0) -> list[np.ndarray]:
    """The unbroken runs of points [n, 2] of curve `k`, in units of the drawing."""
    path = svg_of(fragment).find(f".//g[@class='curve{k}']/path")
    assert path is not None
    runs: list[list[tuple[float, float]]] = []
    for letter, x, y in re.findall(r"([ML]) (\S+) (\S+)", path.attrib["d"]):
        if letter == "M":
            runs.append([])
        runs[-1].append((float(x), float(y)))
    return [np.array(run) for run in runs]


def words_of(fragment: str) -> list[str]:
    return [text.text or "" for text in svg_of(fragment).iter("text")]


def test_a_chart_draws_each_point_of_each_curve():
    chart = line_chart(
        [Curve("a", range(11), [k % 2 for k in range(11)]), Curve("b", [0, 10], [1, 0])]
    )
    (zigzag,), (falling,) = runs_of(chart, 0), runs_of(chart, 1)
    assert (len(zigzag), len(falling)) == (11, 2)
    assert np.allclose(np.diff(zigzag[:, 0]), np.diff(zigzag[:, 0])[0], atol=1e-3)
    assert zigzag[0, 1] > zigzag[1, 1], "up is up"
    assert falling[0, 1] < falling[1, 1]
    assert np.allclose(falling[:, 0], zigzag[[0, -1], 0])
    assert chart.count("<li ") == 2, "a legend"


def test_axes_have_names_and_round_ticks():
    chart = line_chart([Curve("a", [0, 1000], [0.0, 4.2])], x_label="step", y_label="loss")
    assert {"0", "200", "1000", "1", "4", "step", "loss"} <= set(words_of(chart))


def test_a_log_axis_puts_equal_ratios_at_equal_distances():
    chart = line_chart([Curve("a", [0, 1, 2, 3], [10, 1, 0.1, 1])], log_y=True)
    (points,) = runs_of(chart)
    top, middle, bottom, again = points[:, 1]
    assert middle - top == pytest.approx(bottom - middle, abs=0.01)
    assert again == pytest.approx(middle, abs=0.01)
    assert "loss (log scale)" in words_of(chart)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("values", [[3.0], [2, 2], [1e-12, 1e12], [1e6, 1e6 + 1e-6]])
def test_any_range_stays_inside_the_drawing(values, log_y):
    chart = line_chart([Curve("a", range(len(values)), values)], log_y=log_y)
    _, _, width, height = map(float, svg_of(chart).attrib["viewBox"].split())
    for x, y in np.concatenate(runs_of(chart) or [np.empty((0, 2))]):
        assert 0 < x < width
        assert 0 < y < height
    dots = [dot for dot in svg_of(chart).iter("use") if "var(--c0)" in dot.attrib["style"]]
    assert len(dots) == (len(values) == 1), "a lone point is a dot"


def test_points_that_cannot_be_drawn_leave_a_gap_and_a_note():
    curve = Curve("loss", range(8), [4, 3, math.nan, 2, math.inf, 0, 1, 3])
    chart = line_chart([curve])
    assert [len(run) for run in runs_of(chart) if len(run) > 1] == [2, 3]
    assert "loss: 2 points are not finite and left out." in chart
    assert "3 points are not finite and positive" in line_chart([curve], log_y=True)


@pytest.mark.parametrize("y", [[], [math.nan, math.nan]])
def test_a_chart_with_nothing_to_draw_says_so(y):
    chart = line_chart([Curve("loss", range(len(y)), y)])
    assert "No curve to draw." in chart
    assert "loss: " in chart
    assert "<svg" not in chart


def test_an_empty_curve_is_named_beside_a_drawn_one():
    chart = line_chart([Curve("loss", [0, 1], [2, 1]), Curve("eval", [], [])])
    assert len(runs_of(chart)) == 1
    assert "eval: no points." in chart


def test_curves_of_unequal_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"'loss': x has shape \(2,\), y \(1,\)"):
        line_chart([Curve("loss", [0, 1], [1])])


def test_long_curves_are_thinned_without_losing_a_spike():
    y = np.ones(50_000)
    y[31_234] = 9
    (points,) = runs_of(line_chart([Curve("loss", range(50_000), y.tolist())]))
    assert len(points) <= 900
    assert sum(points[:, 1] < points[:, 1].mean() - 100) == 1


def test_colours_are_the_pages_in_the_light_and_in_the_dark():
    curves = [Curve(str(k), [0, 1], [k, 1]) for k in range(COLOURS + 1)]
    chart = line_chart(curves)
    assert not re.findall("#[0-9a-f]{6}", chart), "a colour of matplotlib's own"
    assert {f"var(--c{k})" for k in range(COLOURS)} <= set(re.findall(r"var\(--\w+\)", chart))
    assert 'class="c0 dashed"' in chart, "the seventh line is told from the first"


def test_the_same_curves_are_the_same_bytes_and_share_a_page_with_others():
    one, two = (line_chart([Curve("a", [0, 1], [2, k])]) for k in (1, 5))
    assert one == line_chart([Curve("a", [0, 1], [2, 1])])
    for chart in (one, two):
        ids = re.findall(r'\bid="([^"]*)"', chart)
        assert len(ids) == len(set(ids))
        # Definitions, named by a hash of what they are: the same id is the same shape.
        assert all(re.fullmatch(r"m[0-9a-f]{10}", name) for name in ids)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.1, 10], {"0.1", "0.5", "5"}), ([30, 45], {"36"}), ([1, 1e6], {"1e+06"})],
)
def test_numbers_of_a_log_axis_are_plain(values, ticks):
    words = words_of(line_chart([Curve("a", [0, 1], values)], log_y=True))
    assert ticks <= set(words)
    assert not any("$" in word or "\\" in word for word in words)

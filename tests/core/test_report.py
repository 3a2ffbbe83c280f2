"""Tables and pictures hold what was put in, and the page is whole, escaped and self-contained.

Imports ddray.report, ddray.chart and ddray.errors.
"""

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddray.chart import Curve, line_chart
from ddray.errors import ConfigError, StorageError
from ddray.report import (
    Bar,
    Column,
    Picture,
    Report,
    Table,
    grid,
    labelled_grid,
    markdown_table,
    render_report,
    to_uint8,
    write_report,
    write_summary_table,
)

EVIL = "<script>alert('x')</script> & \"quoted\""
COLUMNS = [
    Column("name", "Generator"),
    Column("fd", "fd_digits", "lower is better", ".2f"),
    Column("accuracy", "Accuracy", format=".1%"),
]
ROWS = [
    {"name": "Teacher", "fd": 4.0, "accuracy": 0.962},
    {"name": "Student | 1 step", "fd": np.float32(12.345), "accuracy": None},
    {"name": "Broken", "fd": math.nan, "unknown": 1},
]


def digits(count: int, channels: int = 1, size: int = 8) -> np.ndarray:
    return np.random.default_rng(count).random((count, channels, size, size), np.float32)


def full_report(text: str = "text") -> Report:
    """A report with `text` in every place that takes one."""
    return Report(
        title=text,
        subtitle=text,
        headline=[(text, text, text)],
        pictures=[
            Picture(text, text, digits(4), 2, [text, "b"]),
            Picture("colour", text, digits(2, channels=3), 2, [text, "b"]),
            Picture("large", text, digits(1, channels=3, size=65), 1),
        ],
        tables=[Table(text, [Column("a", text, text)], [{"a": text}], text, text)],
        protocol=[text],
        bars=[Bar(text, text, text, True), Bar(text, text, "", None), Bar("c", "d", "e", False)],
        curves=[Curve(text, [0, 1], [2, 1])],
        x_label=text,
        y_label=text,
        commands=[text],
        settings={text: {text: text, "nested": {"lr": 0.1, "betas": [0.9, 0.95]}}},
        versions={text: text},
    )


class Page(HTMLParser):
    """Collects the tags of a page and refuses those that do not balance."""

    VOID = ("meta", "link", "img", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def svg_of(fragment: str) -> ET.Element:
    match = re.search(r"<svg.*</svg>", fragment, re.DOTALL)
    assert match is not None
    return ET.fromstring(match.group())


def lines_of(fragment: str) -> list[list[tuple[float, float]]]:
    """The points of each polyline of a chart."""
    polylines = svg_of(fragment).findall("polyline")
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in polylines
    ]


# Pictures


def test_to_uint8_rounds_to_nearest_and_clips():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1, 7], np.float32)
    assert to_uint8(values.reshape(1, 1, 1, 7)).tolist() == [[[0, 0, 0, 1, 127, 255, 255]]]


def test_to_uint8_moves_colour_last():
    images = digits(2, channels=3)
    assert to_uint8(images).shape == (2, 8, 8, 3)
    assert to_uint8(images)[1, 2, 3].tolist() == np.rint(images[1, :, 2, 3] * 255).tolist()
    assert to_uint8(digits(2)).shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8)), r"shape \(2, 8, 8\)"),
        (np.zeros((1, 4, 8, 8)), r"\[N, 1 or 3, H, W\]"),
        (np.zeros((0, 1, 8, 8)), "N >= 1"),
        (np.zeros((1, 1, 8, 8), np.uint8), "uint8; floats"),
        (np.full((1, 1, 8, 8), np.nan), "NaN"),
    ],
)
def test_images_that_cannot_be_shown_are_refused(images, message):
    with pytest.raises(ConfigError, match=message):
        to_uint8(images)


def test_grid_has_every_pixel_where_it_belongs():
    images = np.arange(1, 13).reshape(3, 1, 2, 2) / 255
    # Three 2x2 tiles in two columns, each pixel doubled, one pixel of black around each.
    tile = [np.kron(image[0] * 255, np.ones((2, 2))) for image in images]
    wanted = np.zeros((11, 11))
    wanted[1:5, 1:5], wanted[1:5, 6:10], wanted[6:10, 1:5] = tile
    picture = grid(images, 2, scale=2, pad=1)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), wanted)
    assert np.array_equal(np.asarray(grid(images, 2, scale=2, pad=1, invert=True)), 255 - wanted)


def test_grid_of_colour_and_without_padding():
    picture = grid(digits(4, channels=3), 2, pad=0)
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(picture)[8:, :8], to_uint8(digits(4, channels=3))[2])


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"scale": 0}, {"pad": -1}])
def test_grid_refuses_sizes_out_of_range(wrong):
    with pytest.raises(ConfigError, match="least allowed"):
        grid(digits(1), **{"columns": 1, **wrong})


def test_labelled_grid_keeps_the_columns_of_all_rows_below_each_other():
    one = np.ones((4, 1, 8, 8))
    picture = np.asarray(labelled_grid([("a", one), ("longer name", one)], ["0", "1"], pad=3))
    white = (picture == 255).all(axis=2)
    assert white.sum() == 2 * 4 * 16 * 16
    used = np.flatnonzero(white.any(axis=0))
    assert used.tolist() == [*range(used[0], used[0] + 16), *range(used[0] + 19, used[0] + 35)]
    assert picture.min() < 80, "the labels are drawn"


def test_labelled_grid_inverts_images_only_and_takes_colour_beside_grey():
    rows = [("grey", np.zeros((2, 1, 8, 8))), ("colour", np.zeros((2, 3, 8, 8)))]
    white = (np.asarray(labelled_grid(rows, invert=True)) == 255).all(axis=2)
    assert white.sum() == 2 * 2 * 16 * 16


def test_labelled_grid_cuts_headings_wider_than_their_column():
    images = digits(2)
    wide = labelled_grid([("a", images)], ["a very long class name", "b"])
    assert wide.size == labelled_grid([("a", images)], ["a", "b"]).size


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], (), "one common size"),
        ([("a", digits(1)), ("b", digits(1, size=9))], (), r"\(8, 8\), \(9, 9\)"),
        ([("a", digits(2))], ("x", "y", "z"), "3 column labels for 2 columns"),
    ],
)
def test_labelled_grid_refuses_what_does_not_fit(rows, labels, message):
    with pytest.raises(ConfigError, match=message):
        labelled_grid(rows, labels, columns=2)


# Tables


def test_summary_table_is_aligned():
    assert write_summary_table(ROWS, COLUMNS).splitlines() == [
        "Generator               fd_digits  Accuracy",
        "                  lower is better",
        "────────────────  ───────────────  ────────",
        "Teacher                      4.00     96.2%",
        "Student | 1 step            12.35         –",
        "Broken                          –         –",
    ]


def test_markdown_table_shows_the_same_and_escapes_its_bars():
    assert markdown_table(ROWS, COLUMNS).splitlines() == [
        "| Generator | fd_digits (lower is better) | Accuracy |",
        "| --- | ---: | ---: |",
        "| Teacher | 4.00 | 96.2% |",
        r"| Student \| 1 step | 12.35 | – |",
        "| Broken | – | – |",
    ]


def test_values_have_a_readable_default():
    row = {"a": 0.1 + 0.2, "b": 12345, "c": True, "d": "text", "e": math.inf}
    line = write_summary_table([row], [Column(key, key) for key in row]).splitlines()[-1]
    assert line.split() == ["0.3", "12345", "yes", "text", "inf"]


def test_a_table_without_rows_is_its_headings():
    assert len(write_summary_table([], COLUMNS).splitlines()) == 3


def test_tables_refuse_no_columns_and_a_format_that_does_not_fit():
    with pytest.raises(ConfigError, match="at least one column"):
        write_summary_table(ROWS, [])
    with pytest.raises(ConfigError, match="column 'fd' cannot show 1.5"):
        markdown_table([{"fd": 1.5}], [Column("fd", "FD", format="d")])


# The chart


def test_chart_draws_each_point_of_each_curve():
    curves = [Curve("a", range(11), [float(k) for k in range(11)]), Curve("b", [0, 10], [10, 0])]
    chart = line_chart(curves)
    rising, falling = lines_of(chart)
    assert (len(rising), len(falling)) == (11, 2)
    assert rising[0][0] == falling[0][0] < rising[-1][0] == falling[-1][0]
    assert rising[0][1] == falling[-1][1] > rising[-1][1] == falling[0][1], "up is up"
    assert np.allclose(np.diff(np.array(rising), n=2, axis=0), 0, atol=0.21), "a straight line"
    assert chart.count("<li ") == 2, "a legend"
    ends = [text.text for text in svg_of(chart).findall("text") if "end" in text.get("class", "")]
    assert ends == ["a", "b"], "a name at the end of each line"


def test_chart_axes_have_round_ticks():
    chart = svg_of(line_chart([Curve("a", [0, 1000], [0.0, 4.2])], x_label="step", y_label="loss"))
    words = [text.text for text in chart.findall("text")]
    assert words[:6] == ["0", "1", "2", "3", "4", "5"]
    assert {"0", "200", "1,000", "step", "loss"} <= set(words)


@pytest.mark.parametrize("values", [[2.977, 3.021], [0, 4.2], [-3, 17], [0.11, 9.7]])
@pytest.mark.parametrize("log_y", [False, True])
def test_axis_ends_on_ticks_that_enclose_the_curve(values, log_y):
    values = [abs(value) + log_y for value in values] if log_y else values
    chart = line_chart([Curve("a", [0, 1], values)], log_y=log_y)
    rules = [line for line in svg_of(chart).findall("line") if line.get("class") == "rule"]
    heights = [float(line.attrib["y1"]) for line in rules]
    axis = [line for line in svg_of(chart).findall("line") if line.get("class") == "axis"][-1]
    assert heights[0] == max(heights) == float(axis.attrib["y1"])
    assert 3 <= len(heights) <= 12
    assert all(min(heights) <= y <= max(heights) for _, y in lines_of(chart)[0])


def test_log_axis_puts_equal_ratios_at_equal_distances():
    chart = line_chart([Curve("a", [0, 1, 2], [10, 1, 0.1])], log_y=True)
    ((_, top), (_, middle), (_, bottom)) = lines_of(chart)[0]
    assert middle - top == pytest.approx(bottom - middle, abs=0.11)
    assert ">loss (log scale)<" in chart


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[3.0], [2, 2], [0.02, 0.021], [1e-12, 1e12], [1e6, 1e6 + 1e-6], [1e-3, 1e-2], [7, 29], [0.1]],
)
def test_any_range_stays_inside_the_drawing(values, log_y):
    (points,) = lines_of(line_chart([Curve("a", range(len(values)), values)], log_y=log_y))
    assert len(points) >= 2, "a lone point is doubled, since SVG draws no line of one point"
    assert all(0 < x < 760 and 0 < y < 320 for x, y in points)


def test_names_at_the_ends_do_not_overlap():
    chart = svg_of(line_chart([Curve(str(k), [0, 1], [5, 1 + k / 1e3]) for k in range(8)]))
    ends = [text for text in chart.findall("text") if "end" in text.get("class", "").split()]
    heights = sorted(float(text.attrib["y"]) for text in ends)
    assert len(heights) == 8
    assert min(np.diff(heights)) >= 13.9
    assert 0 < heights[0] < heights[-1] < 320


def test_points_that_cannot_be_drawn_leave_a_gap_and_a_note():
    curve = Curve("loss", range(7), [4, 3, math.nan, 2, math.inf, 0, 1])
    chart = line_chart([curve])
    assert [len(points) for points in lines_of(chart)] == [2, 2, 2]
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
    assert len(lines_of(chart)) == 1
    assert "eval: no points." in chart


def test_curves_of_unequal_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"'loss': x has shape \(2,\), y \(1,\)"):
        line_chart([Curve("loss", [0, 1], [1])])


def test_long_curves_are_thinned_without_losing_a_spike():
    y = np.ones(50_000)
    y[31_234] = 9
    (points,) = lines_of(line_chart([Curve("loss", range(50_000), y.tolist())]))
    assert len(points) <= 900
    assert sum(height < 200 for _, height in points) == 1


# The page


def test_page_is_balanced_and_complete():
    page = Page(render_report(full_report()))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    titles = ["Pictures", "Measurements", "Bars to reach", "Training", "Reproduce", "Settings"]
    assert all(title in page.words for title in titles)
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    for word in ("1 of 3 bars met", "✓ met", "✗ not met", "not measured", "nested.betas"):
        assert word in page.words


def test_page_loads_nothing_and_runs_nothing():
    text = render_report(full_report())
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    links = [attrs.get(key) for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert len(links) == 4
    assert all(link is not None and link.startswith("data:") for link in links)


def test_every_text_is_escaped():
    text = render_report(full_report(EVIL))
    assert "<script" not in text
    page = Page(text)
    assert page.words.count(EVIL) >= 20
    assert svg_of(text).attrib["aria-label"].startswith(EVIL)


def test_pictures_are_whole_pngs_with_transparent_gaps():
    images = digits(3)
    attrs = Page(render_report(Report("t", pictures=[Picture("p", "", images, 2)]))).all("img")[0]
    data = base64.b64decode(str(attrs["src"]).removeprefix("data:image/png;base64,"))
    picture = Image.open(io.BytesIO(data))
    assert [str(size) for size in picture.size] == [attrs["width"], attrs["height"]]
    levels, alpha = (np.asarray(band) for band in picture.split())
    assert (alpha == 255).sum() == images.size
    assert np.array_equal(levels[1:9, 1:9], to_uint8(images)[0])
    assert attrs["class"] == "pixels ink"
    assert attrs["alt"] == "p: 3 images in 2 columns"


def test_neighbouring_pictures_share_their_headings():
    labels = ["zero", "one"]
    pictures = [Picture(name, "", digits(2), 2, labels) for name in "abc"]
    assert len(re.findall('class="heads"', render_report(Report("t", pictures=pictures)))) == 1
    with pytest.raises(ConfigError, match="2 column labels for 3 columns"):
        render_report(Report("t", pictures=[Picture("a", "", digits(3), 3, labels)]))


def test_the_highlighted_row_is_marked():
    table = Table("Quality", COLUMNS, ROWS, highlight="Teacher")
    assert render_report(Report("t", tables=[table])).count('<tr class="strong">') == 1


def test_an_empty_report_has_no_empty_sections():
    page = Page(render_report(Report("Only a title")))
    assert not page.all("h2")
    assert "Only a title" in page.words


def test_write_report_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    write_report(path, Report("first"))
    write_report(str(path), Report("second"))
    assert "<h1>second</h1>" in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the report"):
        write_report(tmp_path / "file" / "report.html", Report("t"))

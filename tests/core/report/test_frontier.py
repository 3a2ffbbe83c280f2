"""The frontier shows every point that was timed, and joins those that none is better than."""

import re
import xml.etree.ElementTree as ET

import pytest

from ddray.report.frontier import KINDS, Point, frontier_chart, pareto_front

POINTS = [
    Point("teacher", 0.15, 3.9, "teacher"),
    Point("one step", 0.02, 9.4, "student"),
    Point("slow and bad", 0.3, 20.0, "skip"),
    Point("theirs <1>", 0.01, 6.2, "student", published=True),
]


@pytest.fixture(scope="module")
def chart():
    return frontier_chart(POINTS, y_label="FID, lower is better")


def drawings_of(chart):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", chart, re.DOTALL)]


def words_of(svg):
    return [text.text for text in svg.iter("text")]


def places_of(svg):
    """Where every marker is, by its number."""
    found = {}
    for group in svg.iter("g"):
        name = group.get("class", "")
        if name.startswith("point"):
            (dot,) = group.iter("use")
            found[int(name.removeprefix("point"))] = dot
    return found


def test_the_front_is_what_none_is_better_than():
    assert [point.label for point in pareto_front(POINTS[:3])] == ["one step", "teacher"]
    same = [Point("a", 1, 2, "student"), Point("b", 1, 2, "student")]
    assert pareto_front(same) == same[:1]
    assert pareto_front([]) == []


def test_faster_is_to_the_left_and_better_is_below(chart):
    wide, _ = drawings_of(chart)
    spots = {k: (float(dot.get("x")), float(dot.get("y"))) for k, dot in places_of(wide).items()}
    assert len(spots) == 4
    teacher, one, bad, theirs = (spots[k] for k in range(4))
    assert theirs[0] < one[0] < teacher[0] < bad[0]
    assert teacher[1] > theirs[1] > one[1] > bad[1]


def test_every_row_is_named_on_a_screen_and_ours_on_a_phone(chart):
    wide, narrow = drawings_of(chart)
    names = {point.label for point in POINTS}
    assert names <= set(words_of(wide))
    assert names & set(words_of(narrow)) == names - {"theirs <1>"}
    assert "seconds an image (log scale)" in words_of(wide)
    assert "FID, lower is better" in words_of(wide), "less than tenfold: no log scale"
    assert "theirs &lt;1&gt;: 6.2 at 0.01 s" in chart


def test_published_points_are_hollow_and_never_on_the_line(chart):
    wide, _ = drawings_of(chart)
    places = places_of(wide)
    assert "fill: var(--page)" in places[3].get("style")
    assert "fill: var(--c0)" in places[1].get("style")
    assert "hollow: published, measured elsewhere" in chart
    front = next(group for group in wide.iter("g") if group.get("class") == "front")
    assert len(re.findall("[ML]", next(front.iter("path")).get("d"))) == 2


def test_distances_over_a_decade_are_on_a_log_scale():
    far = [*POINTS, Point("independent", 0.012, 150.0, "independent")]
    wide, _ = drawings_of(frontier_chart(far, y_label="FID"))
    assert "FID (log scale)" in words_of(wide)


def test_one_point_of_every_kind_has_its_letter_in_the_legend():
    points = [Point(kind, 0.1 + k, 1.0 + k, kind) for k, kind in enumerate(KINDS)]
    chart = frontier_chart(points, y_label="d")
    assert all(f"<b>{letter}</b>{word}</li>" in chart for _, _, letter, word in KINDS.values())
    assert len({(colour, marker) for colour, marker, _, _ in KINDS.values()}) == len(KINDS)
    assert "hollow" not in chart


def test_the_same_points_are_the_same_bytes_in_the_pages_colours(chart):
    assert chart == frontier_chart(POINTS, y_label="FID, lower is better")
    assert not re.findall("#[0-9a-f]{6}", chart)

"""The frontier: how far images are from real ones against how long an image takes.

One point a generator, named beside it; the line joins those that none is better than in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ddray.report.chart import PAGE, SOFT, TEXT, draw, hue, line_style, log_scale
from ddray.report.placement import Box, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# kind of a row: number of its colour, marker of matplotlib, the same as a letter, in the legend
KINDS: dict[str, tuple[int, str, str, str]] = {
    "teacher": (1, "s", "■", "teacher"),
    "transport": (1, "D", "◆", "teacher, by transport"),
    "student": (0, "o", "●", "student"),
    "skip": (2, "^", "▲", "skipping steps"),
    "independent": (5, "v", "▼", "independent tokens"),
    "masked": (3, "P", "✚", "masked decoding"),
    "reconstruction": (4, "*", "★", "tokenizer"),
    "samples": (4, "X", "×", "samples"),
}

_WIDE, _NARROW = (10.5, 5.4), (5.0, 5.4)  # inches
_SIZE, _SMALL = 9.0, 8.0  # of our labels and published ones, in points


@dataclass(frozen=True)
class Point:
    """One generator: a positive number of seconds an image and a distance, lower is better."""

    label: str
    seconds: float
    distance: float
    kind: str
    published: bool = False  # measured elsewhere: hollow, and never on the line


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is better than in one thing and as good in the other, in order."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.distance)):
        if not front or point.distance < front[-1].distance:
            front.append(point)
    return front


def frontier_chart(points: Sequence[Point], *, y_label: str) -> Markup:
    """Draws the frontier as an HTML figure: a legend, an inline SVG and a caption.

    The vertical axis is logarithmic too where distances differ more than tenfold. On a phone a
    narrow drawing takes the place of the wide one, in which published points have no names.

    Args:
        points: of generators that were timed, at least one.
        y_label: name of the distance.

    Returns:
        An HTML fragment.
    """
    # Ours come first to be named, and lie above.
    points = sorted(points, key=lambda point: point.published)
    front = pareto_front([point for point in points if not point.published])
    told = "; ".join(f"{p.label}: {p.distance:.4g} at {p.seconds:.3g} s" for p in points)
    drawings = [
        draw(
            partial(_plot, points=points, front=front, y_label=y_label, names=names),
            f"{y_label} over seconds an image: {told}",
            size,
        )
        for size, names in ((_WIDE, len(points)), (_NARROW, sum(not p.published for p in points)))
    ]
    return Markup(
        '<figure class="chart frontier"><ul class="legend">{}</ul>'
        '<div class="wide">{}</div><div class="narrow">{}</div></figure>'
    ).format(_legend(points, len(front)), *drawings)


def _plot(
    axes: "Axes",
    points: Sequence[Point],
    front: Sequence[Point],
    y_label: str,
    names: int,
) -> None:
    """Draw points and the line through `front` into axes, with the labels of the first `names`."""
    low, high = (choose(point.distance for point in points) for choose in (min, max))
    is_log = low > 0 and high > 10 * low
    axes.set_xlabel("seconds an image (log scale)", loc="right")
    axes.set_title(y_label + " (log scale)" * is_log, loc="left", fontsize=10.5)
    axes.margins(x=0.09, y=0.1)
    line = [(point.seconds, point.distance) for point in front] or [(np.nan, np.nan)]
    axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=0.8, gid="front")
    for k, point in enumerate(points):
        axes.plot(point.seconds, point.distance, **_marker(point), gid=f"point{k}")
    times = [point.seconds for point in points]
    log_scale(axes, "x", min(times), max(times))
    if is_log:
        log_scale(axes, "y", low, high)
    elif low >= 0:
        axes.set_ylim(bottom=0)
    _name(axes, points, front, names)


def _marker(point: Point) -> dict[str, Any]:
    """How `Axes.plot` draws a point."""
    number, shape, _, _ = KINDS[point.kind]
    colour = line_style(number)["color"]
    face = PAGE if point.published else colour
    size = {"s": 6.5, "D": 6.0, "*": 10.0}.get(shape, 8.0)
    style = {"markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 1.3}
    return {
        "marker": shape,
        "markersize": size,
        "linestyle": "",
        "zorder": 4 - point.published,
        **style,
    }


def _legend(points: Sequence[Point], line: int) -> Markup:
    """What markers mean, in the order of `KINDS`."""
    present = {point.kind for point in points}
    items = [
        Markup('<li class="{}"><b>{}</b>{}</li>').format(hue(number), letter, word)
        for kind, (number, _, letter, word) in KINDS.items()
        if kind in present
    ]
    if any(point.published for point in points):
        items.append(Markup("<li><b>○</b>hollow: published, measured elsewhere</li>"))
    if line > 1:
        items.append(Markup("<li><i></i>none is both faster and better</li>"))
    return Markup("").join(items)


def _name(axes: "Axes", points: Sequence[Point], front: Sequence[Point], names: int) -> None:
    """Write the labels of the first points; those far from theirs get a thread."""
    texts = [
        axes.annotate(
            point.label,
            (0, 0),
            xycoords="figure pixels",
            fontsize=_SMALL if point.published else _SIZE,
            color=SOFT if point.published else TEXT,
            zorder=5,
            ha="center",
            va="center",
        )
        for point in points[:names]
    ]
    for text in texts:
        text.set_in_layout(False)
    # Where things are is only known once the figure is laid out.
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    axes.autoscale(False)
    extents = [text.get_window_extent() for text in texts]
    placed = place_labels(
        [_place(axes, point) for point in points],
        [(extent.width, extent.height) for extent in extents],
        [_place(axes, point) for point in front],
        Box(*axes.get_window_extent().extents),
    )
    for point, text, label in zip(points, texts, placed, strict=False):
        text.set_position(label.centre)
        if label.thread:
            there = axes.transData.inverted().transform(label.thread)
            ends = [point.seconds, there[0]], [point.distance, there[1]]
            axes.plot(*ends, color=SOFT, linewidth=0.5, zorder=1)


def _place(axes: "Axes", point: Point) -> tuple[float, float]:
    """Where a point lies in the drawing: 72 to the inch."""
    x, y = axes.transData.transform((point.seconds, point.distance))
    return float(x), float(y)

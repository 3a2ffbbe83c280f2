"""The line chart of the page: an HTML figure with an inline SVG.

Imports ddray.errors only; the colours of the lines are in report.css.
"""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError

_COLOURS = 6  # line colours in report.css
_CHART_W, _CHART_H, _END = 760, 320, 26  # the drawing, and the longest name in it

_Runs = list[npt.NDArray[np.float64]]  # the stretches of a curve without gaps, each [n, 2]


@dataclass(frozen=True)
class Curve:
    """One line of the chart: y over x, of equal length; points that are not finite leave gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def tag(name: str, *inner: str, **attributes: object) -> str:
    """An element around ready HTML; attribute values are escaped, None and "" left out.

    A trailing underscore keeps Python's words apart, one inside stands for a hyphen.
    """
    head = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value not in (None, "")
    )
    if name in ("img", "line", "polyline"):
        return f"<{head}/>"
    return f"<{head}>{''.join(inner)}</{name}>"


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels: [low, high] to [start, end], on a log scale or not, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    """Round values that enclose [low, high], on a log scale where that spans enough of them."""
    if log and high / low >= 3:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) < 5 else (1,)
        marks = [float(f"{m}e{d}") for d in decades for m in steps]
        first = max((i for i, mark in enumerate(marks) if mark <= low), default=0)
        last = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
        every = math.ceil((last - first) / 10)
        return marks[first:last:every] + [marks[last]]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(start, stop + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """Opens a range too narrow to divide; a positive one stays positive, for the log scale."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return low - (abs(low) or 1) / 3, high + (abs(high) or 1) / 3


def _runs(curve: Curve, log_y: bool) -> tuple[_Runs, int]:
    """The drawable stretches of a curve as [n, 2] points, and how many points are left out."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ConfigError(
            f"curve {curve.label!r}: x has shape {x.shape}, y {y.shape}; make them equal"
        )
    good = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    pieces = np.split(np.arange(x.size), np.flatnonzero(np.diff(good)) + 1)
    runs = [_thin(np.stack([x[i], y[i]], axis=1)) for i in pieces if i.size and good[i[0]]]
    return runs, int(np.count_nonzero(~good))


def _thin(points: npt.NDArray[np.float64], most: int = 800) -> npt.NDArray[np.float64]:
    """At most about `most` points: the ends and each stretch's extremes, so no spike is lost."""
    if len(points) <= most:
        return points
    keep = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), most // 2):
        keep |= {int(part[points[part, 1].argmin()]), int(part[points[part, 1].argmax()])}
    return points[sorted(keep)]


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near the wanted ones, `gap` apart so that labels do not overlap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for below, i in itertools.pairwise(order):
        placed[i] = max(placed[i], placed[below] + gap)
    for k, i in enumerate(reversed(order)):
        placed[i] = min(placed[i], high - k * gap)
    return [max(low, height) for height in placed]


def _rule(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    x1, x2, y1, y2 = (round(value, 1) for value in (x1, x2, y1, y2))
    return tag("line", class_=kind, x1=x1, x2=x2, y1=y1, y2=y2)


def _words(kind: str, text: str, x: float, y: float, anchor: str = "start") -> str:
    place = {"x": round(x, 1), "y": round(y, 1), "text_anchor": anchor}
    return tag("text", html.escape(text), class_=kind, **place)


def _axes(points: npt.NDArray[np.float64], log_y: bool, right: float) -> tuple[_Axis, _Axis]:
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    marks = _ticks(*_widened(y0, y1), log_y)
    left = 22 + 9.5 * max(len(f"{mark:,.10g}") for mark in marks)  # room for the phone's letters
    y_axis = _Axis(marks[0], marks[-1], _CHART_H - 44, 36, marks, log_y)
    x0, x1 = _widened(x0, x1)
    ticks = [tick for tick in _ticks(x0, x1, about=7) if x0 <= tick <= x1]
    return _Axis(x0, x1, left, _CHART_W - right, ticks), y_axis


def _axes_svg(x: _Axis, y: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(_rule("rule", x.start, x.end, at, at))
        parts.append(_words("tick", f"{tick:,.10g}", x.start - 8, at + 3.5, "end"))
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(_rule("axis", at, at, y.start, y.start + 4))
        parts.append(_words("tick", f"{tick:,.10g}", at, y.start + 20, "middle"))
    parts.append(_rule("axis", x.start, x.end, y.start, y.start))
    parts.append(_words("title", x_label, x.end, y.start + 39, "end"))
    parts.append(_words("title", y_label + " (log scale)" * y.log, 0, 18))
    return "".join(parts)


def _lines_svg(drawn: Sequence[tuple[str, _Runs]], x: _Axis, y: _Axis) -> str:
    """The polylines, and each curve's name at its end."""
    heights = _spread([y.at(runs[-1][-1, 1]) for _, runs in drawn], 14, y.end, y.start)
    lines = []
    for i, (label, runs) in enumerate(drawn):
        for run in runs:  # a lone point is doubled: SVG draws no line of one point
            points = [f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in run.tolist()]
            points *= 2 if len(points) == 1 else 1
            lines.append(tag("polyline", class_=f"line {_hue(i)}", points=" ".join(points)))
        short = label if len(label) <= _END else label[: _END - 1] + "…"
        lines.append(_words(f"end {_hue(i)}", short, x.end + 8, heights[i] + 3.5))
    return "".join(lines)


def _hue(i: int) -> str:
    return f"c{i % _COLOURS}" + " dashed" * (i >= _COLOURS)


def line_chart(
    curves: Sequence[Curve], *, x_label: str = "step", y_label: str = "loss", log_y: bool = False
) -> str:
    """Draws curves as an HTML figure: a legend, an inline SVG and a caption.

    Points that are not finite (or not positive on a log scale) leave gaps, and the caption counts
    them: a training that diverged still gets its page.

    Args:
        curves: the lines; each stretch without a gap becomes one polyline of class "line".
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        log_y: logarithmic vertical axis.

    Returns:
        An HTML fragment; a sentence instead of the drawing where no curve has a point to draw.

    Raises:
        ConfigError: x and y of a curve differ in length.
    """
    split = [(curve.label, *_runs(curve, log_y)) for curve in curves]
    needed = "finite and positive" if log_y else "finite"
    notes = [
        f"{label}: {lost} points are not {needed} and left out." if lost else f"{label}: no points."
        for label, runs, lost in split
        if lost or not runs
    ]
    caption = tag("figcaption", html.escape(" ".join(notes))) if notes else ""
    drawn = [(label, runs) for label, runs, _ in split if runs]
    if not drawn:
        return tag("figure", tag("p", "No curve to draw."), caption, class_="chart")
    right = 16 + 7 * min(_END, max(len(label) for label, _ in drawn))
    x, y = _axes(np.concatenate([run for _, runs in drawn for run in runs]), log_y, right)
    ends = [f"{label} from {r[0][0, 1]:.4g} to {r[-1][-1, 1]:.4g}" for label, r in drawn]
    legend = [
        tag("li", "<i></i>", html.escape(label), class_=_hue(i))
        for i, (label, _) in enumerate(drawn)
    ]
    svg = tag(
        "svg",
        _axes_svg(x, y, x_label, y_label) + _lines_svg(drawn, x, y),
        viewBox=f"0 0 {_CHART_W} {_CHART_H}",
        role="img",
        aria_label=f"{y_label} over {x_label}: {'; '.join(ends)}",
        # On a phone the names at the ends give way to the legend, and the plot takes their room.
        style=f"--wide:{_CHART_W / (x.end + 16):.3f}",
    )
    return tag("figure", tag("ul", *legend, class_="legend"), svg, caption, class_="chart")

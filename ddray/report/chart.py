"""Charts of the page: drawn by matplotlib as inline SVG, in the page's own colours."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from ddray.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 6  # of lines, in report.css

_SIZE = (10.5, 4.4)  # inches of 72 points
# What matplotlib is told in place of colours of the page, which are other ones in the dark.
_LINES = [f"#00000{k + 1}" for k in range(COLOURS)]
TEXT, SOFT, RULE, PAGE = "#00000a", "#00000b", "#00000c", "#00000d"
_PAGE = {TEXT: "var(--text)", SOFT: "var(--soft)", RULE: "var(--line)", PAGE: "var(--page)"} | {
    stand_in: f"var(--c{k})" for k, stand_in in enumerate(_LINES)
}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "font.size": 10.5,
    "grid.color": RULE,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # letters stay text, in the font of the page
    "svg.hashsalt": "ddray",  # the same bytes for the same curves
    "text.color": SOFT,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
# What a file needs and an element of a page does not.
_SURPLUS = [
    re.compile(r"<(metadata|style|clipPath)\b.*?</\1>|<!--.*?-->", re.DOTALL),
    re.compile(r"<defs>\s*</defs>"),
    re.compile(r' clip-path="[^"]*"| transform="rotate\(-0 [^"]*"'),
    re.compile(r"font-family: [^;\"]*; "),
    re.compile(r"\n *(?=<|\Z)"),
]


@dataclass(frozen=True)
class Curve:
    """One line of the chart: y over x, of equal length; points that are not finite leave gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def draw(
    plot: Callable[["Axes"], None], description: str, size: tuple[float, float] = _SIZE
) -> Markup:
    """An inline SVG of one pair of axes.

    Args:
        plot: draws into the axes, lines in `line_style`.
        description: for those who do not see it.
        size: width and height in inches.

    Returns:
        The element, without ids of its own: a page may hold several.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        plot(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _inline(stream.getvalue(), description, size)


def line_style(k: int) -> dict[str, Any]:
    """Colour and dashes of the k-th line, as `Axes.plot` takes them; a legend has `hue(k)`."""
    return {"color": _LINES[k % COLOURS], "linestyle": "-" if k < COLOURS else "--"}


def hue(k: int) -> str:
    """Classes of what tells of the k-th line on the page."""
    return f"c{k % COLOURS}" + " dashed" * (k >= COLOURS)


def log_scale(axes: "Axes", name: str, low: float, high: float) -> None:
    """Make an axis logarithmic, its numbers plain: 0.5, not 5 times a power of ten in TeX.

    Args:
        axes: of the chart.
        name: "x" or "y".
        low: smallest value on the axis.
        high: largest value on it.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    spans = ((10, (1, 1.5, 2, 3, 5, 7)), (1000, (1, 2, 5)))
    steps = next((steps for span, steps in spans if high < span * low), (1,))
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _inline(text: str, description: str, size: tuple[float, float]) -> Markup:
    """A file of SVG as an element of HTML."""
    width, height = (72 * inches for inches in size)
    inner = text[text.index(">", text.index("<svg")) + 1 :]
    for stand_in, colour in _PAGE.items():
        inner = inner.replace(stand_in, colour)
    for surplus in _SURPLUS:
        inner = surplus.sub("", inner)
    # Names that we gave are classes; of matplotlib's ids only those stay that something refers to.
    inner = re.sub(
        r' id="((?:curve|point)\d+|front)"', r' class="\1"', inner.replace("xlink:href", "href")
    )
    used = set(re.findall(r'href="#([^"]*)"', inner))
    inner = re.sub(r' id="([^"]*)"', lambda found: found[0] * (found[1] in used), inner)
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">'
    return Markup(head + inner)


def line_chart(
    curves: Sequence[Curve], *, x_label: str = "step", y_label: str = "loss", log_y: bool = False
) -> Markup:
    """Draws curves as an HTML figure: a legend, an inline SVG and a caption.

    Points that are not finite (or not positive on a log scale) leave gaps, and the caption counts
    them: a training that diverged still gets its page.

    Args:
        curves: the lines.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        log_y: logarithmic vertical axis.

    Returns:
        An HTML fragment; a sentence instead of the drawing where no curve has a point to draw.

    Raises:
        ConfigError: x and y of a curve differ in length.
    """
    drawable = [(curve.label, *_drawable(curve, log_y)) for curve in curves]
    needed = "finite and positive" if log_y else "finite"
    notes = []
    for label, points, lost in drawable:
        if lost:
            notes.append(f"{label}: {lost} points are not {needed} and left out.")
        elif not len(points):
            notes.append(f"{label}: no points.")
    caption = Markup("<figcaption>{}</figcaption>").format(" ".join(notes)) if notes else ""
    drawn = [(label, points) for label, points, _ in drawable if np.isfinite(points).any()]
    if not drawn:
        return Markup('<figure class="chart"><p>No curve to draw.</p>{}</figure>').format(caption)

    def plot(axes: "Axes") -> None:
        axes.set_xlabel(x_label, loc="right")
        axes.set_title(y_label + " (log scale)" * log_y, loc="left", fontsize=10.5)
        if log_y:
            heights = np.concatenate([points[:, 1] for _, points in drawn])
            log_scale(axes, "y", np.nanmin(heights), np.nanmax(heights))
        for k, (_, points) in enumerate(drawn):
            axes.plot(*points.T, **line_style(k), gid=f"curve{k}")
            axes.plot(*_lone(points).T, **line_style(k) | {"linestyle": ""}, marker=".")

    ends = []
    for label, points in drawn:
        first, last = points[np.isfinite(points[:, 1])][[0, -1], 1]
        ends.append(f"{label} from {first:.4g} to {last:.4g}")
    svg = draw(plot, f"{y_label} over {x_label}: {'; '.join(ends)}")
    legend = Markup("").join(
        Markup('<li class="{}"><i></i>{}</li>').format(hue(k), label)
        for k, (label, _) in enumerate(drawn)
    )
    return Markup(
        '<figure class="chart"><ul class="legend">{}</ul>'
        '<div class="scroll" role="region" tabindex="0" aria-label="Chart">{}</div>{}</figure>'
    ).format(legend, svg, caption)


def _drawable(curve: Curve, log_y: bool) -> tuple[npt.NDArray[np.float64], int]:
    """Points [n, 2], NaN where none can be drawn, and how many those are."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ConfigError(
            f"curve {curve.label!r}: x has shape {x.shape}, y {y.shape}; make them equal"
        )
    good = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    return np.where(good[:, None], np.stack([x, y], axis=1), np.nan), int((~good).sum())


def _lone(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Those without a neighbour, which no line shows."""
    good = np.pad(np.isfinite(points[:, 1]), 1)
    return points[good[1:-1] & ~good[:-2] & ~good[2:]]

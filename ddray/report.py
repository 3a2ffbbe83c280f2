"""Tables for the terminal, pictures of generated images, and the self-contained page report.html.

Imports ddray.errors only; the page loads nothing, its style is the sibling file report.css.
"""

import base64
import html
import io
import itertools
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddray.errors import ConfigError, StorageError

MISSING = "–"
_PAPER, _INK = (246, 246, 243), (28, 30, 34)  # of labelled_grid; as in report.css, light
_COLOURS = 6  # line colours in report.css
_CHART_W, _CHART_H, _END = 760, 320, 26  # the drawing, and the longest name in it

_Runs = list[npt.NDArray[np.float64]]  # the stretches of a curve without gaps, each [n, 2]


@dataclass(frozen=True)
class Column:
    """A table column: the row key it shows, its heading, a unit or word of help, a format spec."""

    key: str
    label: str
    unit: str = ""
    format: str = ""  # as in format(value, spec); "" prints floats with 4 significant digits


@dataclass(frozen=True)
class Table:
    """Rows of measurements; the first column names the row, `highlight` is the name of one."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    highlight: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """Images of one generator, float [N, C, H, W] in [0, 1], filled row by row into `columns`.

    Neighbours with the same columns share their headings: give them the same noise and classes.
    `ink` shows light strokes on black in the colours of the page; None means yes for C = 1.
    """

    name: str
    caption: str
    images: npt.ArrayLike
    columns: int
    column_labels: Sequence[str] = ()
    ink: bool | None = None


@dataclass(frozen=True)
class Curve:
    """One line of the chart: y over x, of equal length; points that are not finite leave gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """A bar that must be reached; `met` None means that it was not measured."""

    what: str
    bar: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Report:
    """Everything on the page; empty parts leave no trace on it."""

    title: str
    subtitle: str = ""
    headline: Sequence[tuple[str, str, str]] = ()  # label, value, note: three to five
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    protocol: Sequence[str] = ()  # sentences printed under the tables
    bars: Sequence[Bar] = ()
    curves: Sequence[Curve] = ()
    x_label: str = "step"
    y_label: str = "loss"
    log_y: bool = False
    commands: Sequence[str] = ()  # to reproduce the page
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


# Pictures


def to_uint8(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rounds images to bytes, values beyond [0, 1] clipped.

    Args:
        images: float [N, C, H, W] in [0, 1] with C = 1 or 3.

    Returns:
        uint8 [N, H, W] for C = 1, [N, H, W, 3] for C = 3.

    Raises:
        ConfigError: another shape or dtype, no images, or values that are not a number.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ConfigError(f"images have shape {array.shape}; [N, 1 or 3, H, W] is needed, N >= 1")
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"images are {array.dtype}; floats in [0, 1] are needed: divide by 255")
    if np.isnan(array).any():
        raise ConfigError("images hold NaN; look at the model that made them")
    levels: npt.NDArray[np.uint8] = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return levels[:, 0] if array.shape[1] == 1 else levels.transpose(0, 2, 3, 1)


def grid(
    images: npt.ArrayLike, columns: int, *, scale: int = 1, pad: int = 2, invert: bool = False
) -> Image.Image:
    """Lays images out row by row on black, each pixel drawn as a square of `scale` pixels.

    Args:
        images: float [N, C, H, W] in [0, 1].
        columns: images a row; the last row may be shorter.
        scale: whole enlargement factor, nearest neighbour.
        pad: pixels of the result between images and around them.
        invert: turns the finished picture into its negative: dark digits on white.

    Returns:
        A picture of mode "L" or "RGB", columns * (W * scale + pad) + pad wide.

    Raises:
        ConfigError: images that `to_uint8` refuses, or a columns, scale or pad out of range.
    """
    levels = to_uint8(images)
    if columns < 1 or scale < 1 or pad < 0:
        raise ConfigError(
            f"columns={columns}, scale={scale}, pad={pad}: the least allowed are 1, 1 and 0"
        )
    tiles = levels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = tiles.shape[1] + pad, tiles.shape[2] + pad
    lines = math.ceil(len(tiles) / columns)
    canvas = np.zeros((lines * height + pad, columns * width + pad, *tiles.shape[3:]), np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height + pad, i % columns * width + pad
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return Image.fromarray(255 - canvas if invert else canvas)


def _grid_mask(images: npt.ArrayLike, columns: int, scale: int, pad: int) -> Image.Image:
    """White where `grid` has an image, black where it has a gap."""
    return grid(np.ones_like(np.asarray(images)[:, :1]), columns, scale=scale, pad=pad)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text) - 1, 0, -1)
    return next((text[:n] + ".." for n in lengths if font.getlength(text[:n] + "..") <= width), "")


def labelled_grid(
    rows: Sequence[tuple[str, npt.ArrayLike]],
    column_labels: Sequence[str] = (),
    *,
    columns: int | None = None,
    scale: int = 2,
    pad: int = 2,
    invert: bool = False,
    font_size: int = 15,
) -> Image.Image:
    """Compares generators in one picture: a block of images each, its name at the left.

    Args:
        rows: (name, float [N, C, H, W] in [0, 1]) of each generator; one column holds what
            belongs together, usually the same noise and class.
        column_labels: headings above the columns; too long ones are cut.
        columns: images a row; None means one for each heading, or all images where there are none.
        scale: whole enlargement factor, nearest neighbour.
        pad: pixels between images.
        invert: shows each image as its negative, for light digits on black.
        font_size: of names and headings, in pixels.

    Returns:
        A picture of mode "RGB", dark text on light paper.

    Raises:
        ConfigError: no rows, images of several sizes, headings that do not match `columns`,
            or anything that `grid` refuses.
    """
    arrays = [np.asarray(images) for _, images in rows]
    sizes = {array.shape[2:] for array in arrays}
    if len(sizes) != 1:
        raise ConfigError(f"rows hold images of sizes {sorted(sizes)}; one common size is needed")
    if columns is None:
        columns = len(column_labels) or max(len(array) for array in arrays)
    if column_labels and len(column_labels) != columns:
        raise ConfigError(f"{len(column_labels)} column labels for {columns} columns")
    font = ImageFont.load_default(size=font_size)
    blocks = [grid(array, columns, scale=scale, pad=pad, invert=invert) for array in arrays]
    gap, head = font_size, 2 * font_size if column_labels else font_size // 2
    left = 2 * gap + math.ceil(max(font.getlength(name) for name, _ in rows))
    height = head + sum(block.height for block in blocks) + gap // 2 * len(blocks)
    page = Image.new("RGB", (left + blocks[0].width + gap, height), _PAPER)
    draw = ImageDraw.Draw(page)
    cell = (blocks[0].width - pad) / columns
    for k, label in enumerate(column_labels):
        middle = (left + pad / 2 + (k + 0.5) * cell, head / 2)
        draw.text(middle, _shortened(label, font, cell), _INK, font, anchor="mm")
    top = head
    for (name, _), array, block in zip(rows, arrays, blocks, strict=True):
        draw.text((left - gap, top + block.height / 2), name, _INK, font, anchor="rm")
        page.paste(block, (left, top), _grid_mask(array, columns, scale, pad))
        top += block.height + gap // 2
    return page


# Tables: one formatter for the terminal, Markdown and the page


def _cell(value: Any, column: Column) -> str:
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, numbers.Real):
        return str(value)
    try:
        whole = isinstance(value, numbers.Integral)
        return format(value, column.format or ("" if whole else ".4g"))
    except ValueError as error:
        raise ConfigError(f"column {column.key!r} cannot show {value!r}: {error}") from error


def _is_number(key: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a column is set flush right: every value it has is a number."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, numbers.Real) for value in values)


def _formatted(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]
) -> tuple[list[list[str]], list[bool]]:
    """Every cell as text, and which columns hold numbers."""
    if not columns:
        raise ConfigError("a table needs at least one column")
    cells = [[_cell(row.get(column.key), column) for column in columns] for row in rows]
    return cells, [_is_number(column.key, rows) for column in columns]


def write_summary_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Sets a table in aligned plain text for the terminal, units on a line of their own.

    Args:
        rows: key -> value; keys of no column are left out, missing values show as a dash.
        columns: what to show, in this order.

    Returns:
        The lines, joined by newlines, none at the end.

    Raises:
        ConfigError: no columns, or a format that does not fit a value.
    """
    cells, is_number = _formatted(rows, columns)
    heads = [[column.label for column in columns]]
    if any(column.unit for column in columns):
        heads.append([column.unit for column in columns])
    widths = [max(map(len, texts)) for texts in zip(*heads, *cells, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in heads + cells
    ]
    lines.insert(len(heads), "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Sets the same table in Markdown; arguments and errors as in `write_summary_table`."""
    cells, is_number = _formatted(rows, columns)
    heads = [f"{col.label} ({col.unit})" if col.unit else col.label for col in columns]
    lines = [heads, ["---:" if number else "---" for number in is_number], *cells]
    escaped = [[" ".join(text.replace("|", "\\|").split()) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# The chart


def _tag(name: str, *inner: str, **attributes: object) -> str:
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
    return _tag("line", class_=kind, x1=x1, x2=x2, y1=y1, y2=y2)


def _words(kind: str, text: str, x: float, y: float, anchor: str = "start") -> str:
    place = {"x": round(x, 1), "y": round(y, 1), "text_anchor": anchor}
    return _tag("text", html.escape(text), class_=kind, **place)


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
            lines.append(_tag("polyline", class_=f"line {_hue(i)}", points=" ".join(points)))
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
    caption = _tag("figcaption", html.escape(" ".join(notes))) if notes else ""
    drawn = [(label, runs) for label, runs, _ in split if runs]
    if not drawn:
        return _tag("figure", _tag("p", "No curve to draw."), caption, class_="chart")
    right = 16 + 7 * min(_END, max(len(label) for label, _ in drawn))
    x, y = _axes(np.concatenate([run for _, runs in drawn for run in runs]), log_y, right)
    ends = [f"{label} from {r[0][0, 1]:.4g} to {r[-1][-1, 1]:.4g}" for label, r in drawn]
    legend = [
        _tag("li", "<i></i>", html.escape(label), class_=_hue(i))
        for i, (label, _) in enumerate(drawn)
    ]
    svg = _tag(
        "svg",
        _axes_svg(x, y, x_label, y_label) + _lines_svg(drawn, x, y),
        viewBox=f"0 0 {_CHART_W} {_CHART_H}",
        role="img",
        aria_label=f"{y_label} over {x_label}: {'; '.join(ends)}",
        # On a phone the names at the ends give way to the legend, and the plot takes their room.
        style=f"--wide:{_CHART_W / (x.end + 16):.3f}",
    )
    return _tag("figure", _tag("ul", *legend, class_="legend"), svg, caption, class_="chart")


# The page


def _scroll(label: str, inner: str) -> str:
    """A box that scrolls sideways by itself, also by keyboard, so that the page never does."""
    return _tag("div", inner, class_="scroll", role="region", tabindex=0, aria_label=label)


def _table(caption: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    head = _tag("thead", _tag("tr", *heads)) if heads else ""
    caption_html = _tag("caption", html.escape(caption))
    return _scroll(caption, _tag("table", caption_html, head, _tag("tbody", *rows)))


def _row(name: str, *cells: str, kinds: Sequence[str] = (), class_: str = "") -> str:
    """A table row of ready HTML; `kinds` are the classes of name and cells."""
    kinds = kinds or [""] * (len(cells) + 1)
    first = _tag("th", name, scope="row", class_=kinds[0])
    rest = [_tag("td", cell, class_=kind) for cell, kind in zip(cells, kinds[1:], strict=True)]
    return _tag("tr", first, *rest, class_=class_)


def _table_html(table: Table) -> str:
    cells, is_number = _formatted(table.rows, table.columns)
    kinds = ["num" if number else "" for number in is_number]
    heads = []
    for column, kind in zip(table.columns, kinds, strict=True):
        unit = _tag("small", html.escape(column.unit)) if column.unit else ""
        heads.append(_tag("th", html.escape(column.label), unit, scope="col", class_=kind))
    rows = [
        _row(*map(html.escape, texts), kinds=kinds, class_="strong" * (texts[0] == table.highlight))
        for texts in cells
    ]
    note = _tag("p", html.escape(table.note), class_="note") if table.note else ""
    return _table(table.caption, heads, rows) + note


def _bars_html(bars: Sequence[Bar]) -> str:
    if not bars:
        return ""
    rows = []
    for bar in bars:
        kind, word = ("met", "✓ met") if bar.met else ("missed", "✗ not met")
        if bar.met is None:
            kind, word = "open", "not measured"
        texts = map(html.escape, (bar.what, bar.bar, bar.measured or MISSING))
        rows.append(_row(*texts, word, kinds=("wrap", "bar", "bar", kind)))
    heads = [_tag("th", word, scope="col") for word in ("What", "Bar", "Measured", "Result")]
    met = sum(bool(bar.met) for bar in bars)
    return _table(f"{met} of {len(bars)} bars met", heads, rows)


def _picture_html(picture: Picture) -> str:
    images = np.asarray(picture.images)
    count, height, width = to_uint8(images).shape[:3]
    pad = max(1, width // 14)
    image = grid(images, picture.columns, pad=pad)
    image.putalpha(_grid_mask(images, picture.columns, 1, pad))  # gaps show the page
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    ink = images.shape[1] == 1 if picture.ink is None else picture.ink
    # Large images are shown reduced, where nearest neighbour would only add jaggies.
    kinds = ["pixels"] * (max(height, width) <= 64) + ["ink"] * ink
    alt = f"{picture.name}: {count} images in {picture.columns} columns"
    if picture.column_labels:
        alt += " headed " + ", ".join(picture.column_labels)
    caption = _tag("b", html.escape(picture.name)) + _tag("span", html.escape(picture.caption))
    img = _tag(
        "img",
        class_=" ".join(kinds),
        width=image.width,
        height=image.height,
        alt=alt,
        src="data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
    )
    return _tag("figure", _tag("figcaption", caption), img)


def _pictures_html(pictures: Sequence[Picture]) -> str:
    blocks = ""
    for (columns, labels), group in itertools.groupby(
        pictures, key=lambda picture: (picture.columns, tuple(picture.column_labels))
    ):
        if labels and len(labels) != columns:
            raise ConfigError(f"{len(labels)} column labels for {columns} columns of a picture")
        spans = [_tag("span", html.escape(label), title=label) for label in labels]
        heads = _tag("div", *spans, class_="heads", aria_hidden="true") if labels else ""
        # Below this width the columns scroll: digits need little of it, class names more.
        least = 1.6 if max(map(len, labels), default=0) <= 2 else 3.6
        strips = _tag(
            "div",
            heads,
            *map(_picture_html, group),
            class_="strips",
            style=f"--n:{columns};--least:{least}rem",
        )
        blocks += _scroll("Pictures", strips)
    return blocks


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, JSON)."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            pairs += _flat(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(item, ensure_ascii=False, default=str)))
    return pairs


def _settings_html(settings: Mapping[str, Mapping[str, Any]]) -> str:
    tables, count = [], 0
    for name, values in settings.items():
        rows = [_row(html.escape(key), html.escape(text)) for key, text in _flat(values)]
        count += len(rows)
        tables.append(_table(name, (), rows))
    return _tag("details", _tag("summary", f"{count} settings"), *tables) if tables else ""


def _measurements_html(tables: Sequence[Table], protocol: Sequence[str]) -> str:
    body = "".join(map(_table_html, tables))
    if protocol:
        sentences = _tag("ul", *(_tag("li", html.escape(sentence)) for sentence in protocol))
        body += _tag("div", _tag("h3", "Protocol"), sentences, class_="protocol")
    return body


def _headline_html(headline: Sequence[tuple[str, str, str]]) -> str:
    cards = [
        _tag("div", _tag("dt", label), _tag("dd", value), _tag("dd", note, class_="note"))
        for label, value, note in (map(html.escape, card) for card in headline)
    ]
    return _tag("dl", *cards, class_="headline") if cards else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>\n" if body else ""


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""


def render_report(report: Report) -> str:
    """Sets the page.

    Args:
        report: what to show; every text in it is escaped.

    Returns:
        A whole HTML document that refers to no other file and runs no script.

    Raises:
        ConfigError: images, tables or curves that cannot be shown.
    """
    style = resources.files("ddray").joinpath("report.css").read_text("utf-8")
    title, subtitle = html.escape(report.title), html.escape(report.subtitle)
    chart = ""
    if report.curves:
        labels = {"x_label": report.x_label, "y_label": report.y_label}
        chart = line_chart(report.curves, **labels, log_y=report.log_y)
    commands = ""
    if report.commands:
        lines = html.escape("\n".join(report.commands))
        commands = _scroll("Commands", _tag("pre", _tag("code", lines)))
    versions = [
        _tag("div", _tag("dt", html.escape(name)), _tag("dd", html.escape(version)))
        for name, version in report.versions.items()
    ]
    footer = _tag("dl", *versions) if versions else ""
    return (
        f"{_HEAD}<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1><p>{subtitle}</p></header>\n<main>\n"
        + _headline_html(report.headline)
        + _section("Pictures", _pictures_html(report.pictures))
        + _section("Measurements", _measurements_html(report.tables, report.protocol))
        + _section("Bars to reach", _bars_html(report.bars))
        + _section("Training", chart)
        + _section("Reproduce", commands)
        + _section("Settings", _settings_html(report.settings))
        + f"</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the page of `render_report` to a local file, whole or not at all.

    Args:
        path: the HTML file; missing folders are made, an older file is replaced.
        report: what to show.

    Raises:
        ConfigError: images, tables or curves that cannot be shown.
        StorageError: the file cannot be written.
    """
    text, target = render_report(report), Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write the report {target}: {error}") from error

"""Tables for the terminal, pictures of generated images, and the self-contained page report.html.

Imports ddray.chart and ddray.errors; the page loads nothing, its style is the sibling file
report.css.
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

from ddray.chart import Curve, line_chart, tag
from ddray.errors import ConfigError, StorageError

MISSING = "–"
_PAPER, _INK = (246, 246, 243), (28, 30, 34)  # of labelled_grid; as in report.css, light


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


# The page


def _scroll(label: str, inner: str) -> str:
    """A box that scrolls sideways by itself, also by keyboard, so that the page never does."""
    return tag("div", inner, class_="scroll", role="region", tabindex=0, aria_label=label)


def _table(caption: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    head = tag("thead", tag("tr", *heads)) if heads else ""
    caption_html = tag("caption", html.escape(caption))
    return _scroll(caption, tag("table", caption_html, head, tag("tbody", *rows)))


def _row(name: str, *cells: str, kinds: Sequence[str] = (), class_: str = "") -> str:
    """A table row of ready HTML; `kinds` are the classes of name and cells."""
    kinds = kinds or [""] * (len(cells) + 1)
    first = tag("th", name, scope="row", class_=kinds[0])
    rest = [tag("td", cell, class_=kind) for cell, kind in zip(cells, kinds[1:], strict=True)]
    return tag("tr", first, *rest, class_=class_)


def _table_html(table: Table) -> str:
    cells, is_number = _formatted(table.rows, table.columns)
    kinds = ["num" if number else "" for number in is_number]
    heads = []
    for column, kind in zip(table.columns, kinds, strict=True):
        unit = tag("small", html.escape(column.unit)) if column.unit else ""
        heads.append(tag("th", html.escape(column.label), unit, scope="col", class_=kind))
    rows = [
        _row(*map(html.escape, texts), kinds=kinds, class_="strong" * (texts[0] == table.highlight))
        for texts in cells
    ]
    note = tag("p", html.escape(table.note), class_="note") if table.note else ""
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
    heads = [tag("th", word, scope="col") for word in ("What", "Bar", "Measured", "Result")]
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
    caption = tag("b", html.escape(picture.name)) + tag("span", html.escape(picture.caption))
    img = tag(
        "img",
        class_=" ".join(kinds),
        width=image.width,
        height=image.height,
        alt=alt,
        src="data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
    )
    return tag("figure", tag("figcaption", caption), img)


def _pictures_html(pictures: Sequence[Picture]) -> str:
    blocks = ""
    for (columns, labels), group in itertools.groupby(
        pictures, key=lambda picture: (picture.columns, tuple(picture.column_labels))
    ):
        if labels and len(labels) != columns:
            raise ConfigError(f"{len(labels)} column labels for {columns} columns of a picture")
        spans = [tag("span", html.escape(label), title=label) for label in labels]
        heads = tag("div", *spans, class_="heads", aria_hidden="true") if labels else ""
        # Below this width the columns scroll: digits need little of it, class names more.
        least = 1.6 if max(map(len, labels), default=0) <= 2 else 3.6
        strips = tag(
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
    return tag("details", tag("summary", f"{count} settings"), *tables) if tables else ""


def _measurements_html(tables: Sequence[Table], protocol: Sequence[str]) -> str:
    body = "".join(map(_table_html, tables))
    if protocol:
        sentences = tag("ul", *(tag("li", html.escape(sentence)) for sentence in protocol))
        body += tag("div", tag("h3", "Protocol"), sentences, class_="protocol")
    return body


def _headline_html(headline: Sequence[tuple[str, str, str]]) -> str:
    cards = [
        tag("div", tag("dt", label), tag("dd", value), tag("dd", note, class_="note"))
        for label, value, note in (map(html.escape, card) for card in headline)
    ]
    return tag("dl", *cards, class_="headline") if cards else ""


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
        commands = _scroll("Commands", tag("pre", tag("code", lines)))
    versions = [
        tag("div", tag("dt", html.escape(name)), tag("dd", html.escape(version)))
        for name, version in report.versions.items()
    ]
    footer = tag("dl", *versions) if versions else ""
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

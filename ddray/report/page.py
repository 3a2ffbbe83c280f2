"""The self-contained page report.html: it loads nothing and runs nothing."""

import base64
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ddray.errors import ConfigError
from ddray.report.chart import Curve, line_chart
from ddray.report.frontier import Point, frontier_chart
from ddray.report.pictures import Picture, grid, grid_mask, reduced, to_uint8
from ddray.report.table import Table, formatted_cells, note_mark

_FOLDER = Path(__file__).parent
SHOWN_SIDE = 128  # pixels of an image on the page, at most
_LONG = 40  # letters of a cell, above which it may be several lines
_DENSE = 8  # columns, above which they move together


@dataclass(frozen=True)
class Report:
    """Everything on the page; empty parts leave no trace on it."""

    title: str
    subtitle: str = ""
    headline: Sequence[tuple[str, str, str]] = ()  # label, value, note: three to five
    frontier: Sequence[Point] = ()  # of generators that were timed
    distance: str = ""  # what the frontier's points are at, lower is better
    frontier_note: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    meaning: str = ""  # of the numbers, in a sentence under the tables
    protocol: Sequence[str] = ()  # sentences printed under the tables
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the protocol, below its sentences
    curves: Sequence[Curve] = ()
    x_label: str = "step"
    y_label: str = "loss"
    log_y: bool = False
    commands: Sequence[str] = ()  # to reproduce the page
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def render_report(report: Report) -> str:
    """Sets the page.

    Args:
        report: what to show; every text in it is escaped.

    Returns:
        A whole HTML document that refers to no other file and runs no script.

    Raises:
        ConfigError: images, tables or curves that cannot be shown.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined
    )
    labels = {"x_label": report.x_label, "y_label": report.y_label}
    return environment.get_template("report.html.jinja").render(
        report=report,
        style=Markup((_FOLDER / "report.css").read_text("utf-8")),
        frontier=frontier_chart(report.frontier, y_label=report.distance)
        if report.frontier
        else "",
        strips=list(_strips(report.pictures)),
        tables=[_shown(table) for table in report.tables],
        chart=line_chart(report.curves, **labels, log_y=report.log_y) if report.curves else "",
        facts=[(key, _fact(value)) for key, value in report.facts.items()],
        settings=[(name, _flat(values)) for name, values in report.settings.items()],
    )


def _strips(pictures: Sequence[Picture]) -> Iterable[dict[str, Any]]:
    """Neighbouring pictures of the same columns, below the headings that they share."""
    for (columns, labels), group in itertools.groupby(
        pictures, key=lambda picture: (picture.columns, tuple(picture.column_labels))
    ):
        if labels and len(labels) != columns:
            raise ConfigError(f"{len(labels)} column labels for {columns} columns of a picture")
        # Below this width the columns scroll: digits need little of it, class names more.
        least = 1.6 if max(map(len, labels), default=0) <= 2 else 3.6
        shown = [_image(picture) for picture in group]
        yield {"columns": columns, "labels": labels, "least": least, "pictures": shown}


def _image(picture: Picture) -> dict[str, Any]:
    """A picture as one image that holds its bytes; gaps are transparent and show the page."""
    size = to_uint8(picture.images).shape[1:3]
    images = reduced(picture.images, SHOWN_SIDE)
    count, height, width = to_uint8(images).shape[:3]
    pad = max(1, width // 14)
    image = grid(images, picture.columns, pad=pad)
    image.putalpha(grid_mask(images, picture.columns, 1, pad))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    ink = images.shape[1] == 1 if picture.ink is None else picture.ink
    # Where nearest neighbour would only add jaggies, it is left to the browser.
    kinds = ["pixels"] * (max(size) <= 64) + ["ink"] * ink
    alt = f"{picture.name}: {count} images in {picture.columns} columns"
    if picture.column_labels:
        alt += " headed " + ", ".join(picture.column_labels)
    return {
        "name": picture.name,
        "caption": picture.caption,
        "kinds": " ".join(kinds),
        "width": image.width,
        "height": image.height,
        "alt": alt,
        "source": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
    }


def _shown(table: Table) -> dict[str, Any]:
    cells, is_number = formatted_cells(table.rows, table.columns)
    longest = [max(map(len, texts)) for texts in zip(*cells, strict=True)] or [0] * len(is_number)
    kinds = ["num" if number else "" for number in is_number]
    return {
        "caption": table.caption,
        "heads": [(column.label, column.unit) for column in table.columns],
        "rows": cells,
        # Sentences are broken into lines, names and numbers are not.
        "kinds": [kind or "long" * (n > _LONG) for kind, n in zip(kinds, longest, strict=True)],
        "dense": len(table.columns) > _DENSE,
        "highlight": table.highlight,
        "note": table.note,
        "notes": [(note_mark(k), text) for k, text in enumerate(table.notes, 1)],
    }


def _fact(value: Any) -> str:
    """A value of the protocol, as a person writes it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, JSON)."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            pairs += _flat(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(item, ensure_ascii=False, default=str)))
    return pairs

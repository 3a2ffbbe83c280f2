"""Tables of measurements, set for the terminal, for Markdown and for the page by one formatter."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddray.errors import ConfigError

MISSING = "–"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """A table column: the row key it shows, its heading, a unit or word of help, a format spec."""

    key: str
    label: str
    unit: str = ""
    format: str = ""  # as in format(value, spec); "" prints floats with 4 significant digits


@dataclass(frozen=True)
class Marked:
    """A value of a cell with the numbers, from 1, of the notes below the table that it has."""

    value: Any
    notes: Sequence[int]


@dataclass(frozen=True)
class Table:
    """Rows of measurements; the first column names the row, `highlight` is the name of one.

    `note` stands below, and so do the numbered `notes`, which cells refer to by `Marked`.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    highlight: str = ""
    notes: Sequence[str] = ()


def note_mark(number: int) -> str:
    """The number of a note as a superscript, which HTML, Markdown and terminals all show."""
    return str(number).translate(_RAISED)


def _cell(value: Any, column: Column) -> str:
    if isinstance(value, Marked):
        marks = (note_mark(number) for number in value.notes)
        return " ".join((_cell(value.value, column), " ".join(marks))).strip()
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
    cells = (row.get(key) for row in rows)
    values = [cell.value if isinstance(cell, Marked) else cell for cell in cells]
    values = [value for value in values if value is not None]
    return bool(values) and all(isinstance(value, numbers.Real) for value in values)


def formatted_cells(
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
    cells, is_number = formatted_cells(rows, columns)
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
    cells, is_number = formatted_cells(rows, columns)
    heads = [f"{col.label} ({col.unit})" if col.unit else col.label for col in columns]
    lines = [heads, ["---:" if number else "---" for number in is_number], *cells]
    escaped = [[" ".join(text.replace("|", "\\|").split()) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

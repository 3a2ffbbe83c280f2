"""Files of prompts as text, as benchmarks have them: one a line, or a table with a header.

None of these has an index: it is the number of the row. COCO's captions and PartiPrompts are tables
with a column `Prompt`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddray.errors import ConfigError, one_line
from ddray.storage.caption_row import CaptionColumn, FoundRow, column_of

TEXT_ENDINGS = (".txt", ".tsv", ".csv")
_BUFFER_BYTES = 1 << 20
# What stands for the bytes that are no UTF-8, so that they are the fault of their row alone.
_ESCAPED = re.compile("[\udc80-\udcff]")


class TextCaptions:
    """A file of TEXT_ENDINGS; see `CaptionReader`.

    Args:
        file: open for reading bytes.
        ending: of its name.
        column: that holds the captions; None = the first of COLUMNS.

    Raises:
        ConfigError: if it is no table with such a column.
    """

    what = "rows"
    is_empty = False
    has_features = False

    def __init__(self, file: Any, ending: str, column: str | None) -> None:
        buffered: Any = io.BufferedReader(file, _BUFFER_BYTES)
        self._text = io.TextIOWrapper(
            buffered, encoding="utf-8-sig", errors="surrogateescape", newline=""
        )
        self._is_table = ending != ".txt"
        self.column = CaptionColumn("prompt")
        if not self._is_table:
            if column is not None:
                raise ConfigError(f"caption_column={column!r}, but a .txt has no columns")
            return
        with _errors():
            header = next(self._text, "")
            if reason := _no_utf8(header):
                raise ConfigError(f"its first line {reason}")
            # COCO's captions are divided by tabs, whatever the name of their file ends in.
            self._delimiter = "\t" if "\t" in header else ","
            self._names = next(csv.reader([header], delimiter=self._delimiter), [])
        self.column = column_of(self._names, column)

    def rows(self, features: bool) -> Iterator[FoundRow]:
        """All rows in their order.

        Raises:
            ConfigError: if it is no table.
        """
        with _errors():
            yield from self._table() if self._is_table else self._lines()

    def _lines(self) -> Iterator[FoundRow]:
        for number, line in enumerate(_captions(self._text)):
            name = f"row {number}"
            fault = _fault(name, [line])
            yield FoundRow(name, fault=fault) if fault else FoundRow(name, line, record={})

    def _table(self) -> Iterator[FoundRow]:
        place = self._names.index(self.column.name)
        rows = (row for row in csv.reader(self._text, delimiter=self._delimiter) if row)
        for number, row in enumerate(rows):
            name = f"row {number}"
            fault = _fault(name, row)
            if fault is None and len(row) <= place:
                fault = f"{name} has {len(row)} of {len(self._names)} columns"
            if fault:
                yield FoundRow(name, fault=fault)
                continue
            record = dict(zip(self._names, row, strict=False))
            yield FoundRow(name, self.column.of(row[place]), record=record)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise ConfigError(f"it is no table ({one_line(error)})") from error


def _captions(text: Iterable[str]) -> Iterator[str]:
    """Each line, an empty one too: only behind the last one they mean nothing."""
    blank = 0
    for line in text:
        caption = line.rstrip("\r\n")
        if not caption.strip():
            blank += 1
            continue
        yield from ("" for _ in range(blank))
        blank = 0
        yield caption


def _fault(name: str, cells: Iterable[str]) -> str | None:
    """What is wrong with the bytes of a row; None where all is well."""
    reason = next(filter(None, map(_no_utf8, cells)), None)
    return f"{name} {reason}" if reason else None


def _no_utf8(text: str) -> str | None:
    """Which byte of a text is not of UTF-8; None where all are."""
    byte = _ESCAPED.search(text)
    return f"is no UTF-8: byte 0x{ord(byte[0]) - 0xDC00:02x}" if byte else None

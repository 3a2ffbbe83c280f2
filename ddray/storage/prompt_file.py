"""Files of prompts as text, as benchmarks have them: one a line, or a table with a header.

None of these has an index: it is the number of the row. COCO's captions and PartiPrompts are tables
with a column `Prompt`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddray.errors import ConfigError, one_line
from ddray.storage.caption_row import CaptionColumn, FoundRow, column_of

TEXT_ENDINGS = (".txt", ".tsv", ".csv")
_BUFFER_BYTES = 1 << 20


class TextCaptions:
    """A file of TEXT_ENDINGS; see `CaptionReader`.

    Args:
        file: open for reading bytes.
        ending: of its name.
        column: that holds the captions; None = the first of COLUMNS.

    Raises:
        ConfigError: if it is no text, or no table with such a column.
    """

    what = "rows"
    is_empty = False
    has_features = False

    def __init__(self, file: Any, ending: str, column: str | None) -> None:
        buffered: Any = io.BufferedReader(file, _BUFFER_BYTES)
        self._text = io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="")
        self._is_table = ending != ".txt"
        self.column = CaptionColumn("prompt")
        if not self._is_table:
            if column is not None:
                raise ConfigError(f"caption_column={column!r}, but a .txt has no columns")
            return
        with _errors():
            header = next(self._text, "")
            # COCO's captions are divided by tabs, whatever the name of their file ends in.
            self._delimiter = "\t" if "\t" in header else ","
            self._names = next(csv.reader([header], delimiter=self._delimiter), [])
        self.column = column_of(self._names, column)

    def rows(self, features: bool) -> Iterator[FoundRow]:
        """All rows in their order.

        Raises:
            ConfigError: if it is no text, or no table.
        """
        with _errors():
            yield from self._table() if self._is_table else self._lines()

    def _lines(self) -> Iterator[FoundRow]:
        for number, line in enumerate(_captions(self._text)):
            yield FoundRow(f"row {number}", line, record={})

    def _table(self) -> Iterator[FoundRow]:
        place = self._names.index(self.column.name)
        rows = (row for row in csv.reader(self._text, delimiter=self._delimiter) if row)
        for number, row in enumerate(rows):
            name = f"row {number}"
            if len(row) <= place:
                there = f"{len(row)} of {len(self._names)} columns"
                yield FoundRow(name, fault=f"{name} has {there}")
                continue
            record = dict(zip(self._names, row, strict=False))
            yield FoundRow(name, self.column.of(row[place]), record=record)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is no text in UTF-8 ({error})") from error
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

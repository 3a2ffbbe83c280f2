"""Files of prompts as benchmarks have them: one a line, a table with a header, JSON lines.

None of these has an index: it is the number of the row. COCO's captions and PartiPrompts are tables
with a column `Prompt`, GenEval's metadata JSON lines with `prompt`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ddray.errors import ConfigError, one_line

TEXT_ENDINGS = (".txt", ".tsv", ".csv")
COLUMNS = ("caption", "Caption", "prompt", "Prompt")
"""Where a caption is looked for if nobody names its column, the first that is there."""
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """One row of such a file.

    Attributes:
        text: the caption.
        record: all that the file says of it, as a JSON object.
    """

    text: str
    record: str


def column_of(names: Iterable[str], column: str | None) -> str:
    """The column of captions among some.

    Raises:
        ConfigError: if it is not there.
    """
    known = list(names)
    for name in COLUMNS if column is None else (column,):
        if name in known:
            return name
    if column is not None:
        raise ConfigError(f"there is no column {column!r}; it has {', '.join(known)}")
    raise ConfigError(
        f"there is no column {', '.join(COLUMNS)}; it has {', '.join(known)}: name the one with "
        "the captions by --caption-column"
    )


def text_prompts(file: Any, ending: str, column: str | None) -> Iterator[Prompt]:
    """Rows of a file of TEXT_ENDINGS, one after the other.

    Args:
        file: open for reading bytes.
        ending: of its name.
        column: that holds the captions; None = the first of COLUMNS.

    Raises:
        ConfigError: if it is no text, or no table with such a column.
    """
    buffered: Any = io.BufferedReader(file, _BUFFER_BYTES)
    text = io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="")
    try:
        if ending == ".txt":
            if column is not None:
                raise ConfigError(f"caption_column={column!r}, but a .txt has no columns")
            yield from _lines(text)
        else:
            yield from _table(text, column)
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is no text in UTF-8 ({error})") from error
    except csv.Error as error:
        raise ConfigError(f"it is no table ({one_line(error)})") from error


def json_prompts(rows: Iterable[dict[str, Any]], column: str | None) -> Iterator[Prompt]:
    """Rows of JSON lines without an index.

    Raises:
        ConfigError: if one has no such key, or no text in it.
    """
    name = None
    for number, row in enumerate(rows):
        name = name or column_of(row, column)
        text = row.get(name)
        if not isinstance(text, str):
            raise ConfigError(f"row {number} has no text in {name!r}")
        record = {key: value for key, value in row.items() if key != "features"}
        yield Prompt(text, json.dumps(record | {"prompt": text}))


def _lines(text: Iterable[str]) -> Iterator[Prompt]:
    """Each line, an empty one too: only behind the last one they mean nothing."""
    blank = 0
    for line in text:
        caption = line.rstrip("\r\n")
        if not caption.strip():
            blank += 1
            continue
        yield from (_bare("") for _ in range(blank))
        blank = 0
        yield _bare(caption)


def _bare(caption: str) -> Prompt:
    return Prompt(caption, json.dumps({"prompt": caption}))


def _table(text: Any, column: str | None) -> Iterator[Prompt]:
    header = next(text, "")
    # COCO's captions are divided by tabs, whatever the name of their file ends in.
    delimiter = "\t" if "\t" in header else ","
    names = next(csv.reader([header], delimiter=delimiter), [])
    place = names.index(column_of(names, column))
    rows = (row for row in csv.reader(text, delimiter=delimiter) if row)
    for number, row in enumerate(rows):
        if len(row) <= place:
            raise ConfigError(f"row {number} has {len(row)} of {len(names)} columns")
        record = dict(zip(names, row, strict=False)) | {"prompt": row[place]}
        yield Prompt(row[place], json.dumps(record))

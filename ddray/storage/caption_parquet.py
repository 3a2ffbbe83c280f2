"""Captions in Parquet: ours, with index, caption and perhaps features, or those that people have.

LAION's have a column `TEXT`; img2dataset's have `caption` and `status`, and those rows count that
have an image, whose status is `success`.

Shapes: T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError
from ddray.storage.caption_row import CaptionColumn, FoundRow, column_of

# A row of 120 positions of flan-t5-xl is a megabyte.
_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


class ParquetCaptions:
    """A Parquet file; see `CaptionReader`.

    Args:
        file: open for reading bytes anywhere.
        column: that holds the captions, which makes it a file of prompts; None = `caption` beside
            `index`, or without one the first of COLUMNS.

    Raises:
        ConfigError: for columns that are missing or of another type.
    """

    is_empty = False

    def __init__(self, file: Any, column: str | None) -> None:
        # A buffered stream, or a whole row group would be in memory.
        self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        schema = self._file.schema_arrow
        self._is_ours = "index" in schema.names and column is None
        if self._is_ours:
            self.column = CaptionColumn("caption")
            _check(schema, "index", "integers", pa.types.is_integer)
        else:
            self.column = column_of(schema.names, column)
        _check(schema, self.column.name, "strings, or lists of them,", _is_texts)
        self.has_features = self._is_ours and "features" in schema.names
        if self.has_features:
            _check(schema, "features", "lists of T lists of D floats", _is_matrix)
        has_status = "status" in schema.names and _is_text(schema.field("status").type)
        self._has_status = has_status and not self._is_ours
        self.what = "rows of status success" if self._has_status else "rows"

    def rows(self, features: bool) -> Iterator[FoundRow]:
        """All rows in their order, those without an image left out."""
        number = 0
        columns = [self.column.name] + ["status"] * self._has_status
        if self._is_ours:
            columns += ["index"] + ["features"] * features
        for batch in self._file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            found = self._ours(batch, number) if self._is_ours else self._prompts(batch, number)
            yield from found
            number += len(batch)

    def _ours(self, batch: Any, first: int) -> Iterator[FoundRow]:
        given = matrices(batch["features"]) if "features" in batch.schema.names else None
        indices = batch["index"].to_pylist()
        for i, (index, text) in enumerate(zip(indices, _values(batch["caption"]), strict=True)):
            if index is None:
                yield FoundRow(f"row {first + i}", fault=f"row {first + i} has no index")
                continue
            fault = _fault(text, name := f"index {index}")
            yield FoundRow(name, text, index, given[i] if given else None, fault=fault)

    def _prompts(self, batch: Any, first: int) -> Iterator[FoundRow]:
        status = _values(batch["status"]) if self._has_status else ["success"] * len(batch)
        for i, value in enumerate(_values(batch[self.column.name])):
            if status[i] == "success":
                name = f"row {first + i}"
                yield FoundRow(name, self.column.of(value), fault=_fault(value, name))


def _check(schema: Any, name: str, rule: str, fits: Any) -> None:
    if name not in schema.names:
        raise ConfigError(f"there is no column {name!r}; it has {', '.join(schema.names)}")
    if not fits(schema.field(name).type):
        raise ConfigError(f"column {name!r} is {schema.field(name).type}; {rule} are needed")


def _is_text(kind: Any) -> bool:
    return kind in (pa.string(), pa.large_string())


def _is_list(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists)


def _is_texts(kind: Any) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _is_matrix(kind: Any) -> bool:
    inner = kind.value_type if _is_list(kind) else None
    return inner is not None and _is_list(inner) and pa.types.is_floating(inner.value_type)


def _values(column: Any) -> list[Any]:
    """What each row has; the error in place of what is no UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        if len(column) == 1:
            return [error]
        return [value for i in range(len(column)) for value in _values(column.slice(i, 1))]
    return values


def _fault(value: Any, name: str) -> str | None:
    is_error = isinstance(value, UnicodeDecodeError)
    return f"the caption of {name} is no UTF-8 ({value})" if is_error else None


def matrices(rows: Any) -> list[npt.NDArray[np.float32]]:
    """Features of each row of a column of lists of lists.

    Returns:
        Arrays float32 [T, D]; an empty one [0] for a row that is no matrix.
    """
    positions = rows.flatten()
    values = positions.flatten()
    widths = np.unique(pc.list_value_length(positions.drop_null()))
    if rows.null_count or positions.null_count or values.null_count or len(widths) > 1:
        if len(rows) == 1:
            return [np.empty(0, np.float32)]
        return [matrix for i in range(len(rows)) for matrix in matrices(rows.slice(i, 1))]
    width = int(widths[0]) if len(widths) else 0
    matrix = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    ends = np.cumsum(pc.list_value_length(rows).to_numpy(zero_copy_only=False))
    return np.split(matrix.reshape(int(ends[-1]), width), ends[:-1])

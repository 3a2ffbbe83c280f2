"""Captions in JSON lines: ours, with index, caption and perhaps features, or those of people.

GenEval's metadata are lines with `prompt`. Beside a file of LlamaGen's, `a.jsonl`, may lie what its
extract_t5_feature leaves of line i: `a/i.npy`, float32 [1, T, D].

Shapes: T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, tee
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError, one_line
from ddray.file_kind import explained, json_value
from ddray.storage import open_beside
from ddray.storage.base import read_ahead
from ddray.storage.caption_row import CaptionColumn, FoundRow, column_of

_BUFFER_BYTES = 1 << 20
_NO_MATRIX = np.empty(0, np.float32)
# The number of a line from 1 on, and the object in it, or why there is none.
_Line = tuple[int, dict[str, Any] | str]


class JsonCaptions:
    """A file of JSON lines; see `CaptionReader`.

    Args:
        file: open for reading bytes.
        uri: of it.
        column: that holds the captions, which makes it a file of prompts; None = `caption` beside
            `index`, or without one the first of COLUMNS.
        has_tree: whether features of prompts lie beside, as shards before this one have it; else
            they do if those of the first line are there.

    Raises:
        ConfigError: if its first line is no object with such keys.
    """

    what = "rows"

    def __init__(self, file: Any, uri: str, column: str | None, has_tree: bool) -> None:
        lines = _lines(file)
        begun = next(lines, None)
        self._lines = chain([begun], lines) if begun else lines
        first = begun[1] if begun else {}
        if isinstance(first, str):
            raise ConfigError(first)
        self.is_empty = begun is None
        self._is_ours = not first or (column is None and "index" in first)
        self._storage, name = open_beside(uri)
        self._stem = name.split(".")[0]
        self.column = CaptionColumn("caption")
        if not self._is_ours:
            self.column = column_of(first, column)
        self._is_tree = not self._is_ours and (has_tree or self._has_tree())
        self.has_features = self._is_tree or (self._is_ours and "features" in first)

    def rows(self, features: bool) -> Iterator[FoundRow]:
        """All rows in their order.

        Raises:
            StorageError: if features beside it cannot be read.
        """
        if self._is_ours:
            yield from (self._ours(number, line, features) for number, line in self._lines)
        elif self._is_tree and features:
            yield from self._with_tree()
        else:
            yield from (self._prompt(row, line) for row, (_, line) in enumerate(self._lines))

    def _ours(self, number: int, line: dict[str, Any] | str, features: bool) -> FoundRow:
        at = f"line {number}"
        if isinstance(line, str) or not line.keys() >= {"index", "caption"}:
            told = line if isinstance(line, str) else f"{at} is no object with index and caption"
            return FoundRow(at, fault=told)
        index = line["index"]
        if not isinstance(index, int) or isinstance(index, bool):
            return FoundRow(at, fault=f"index {index!r} is no integer")
        fault = None
        if ("features" in line) != self.has_features:
            fault = f"features must be in every line or in none; see index {index}"
        given = _matrix(line["features"]) if features and not fault else None
        return FoundRow(f"index {index}", line["caption"], index, given, fault=fault)

    def _prompt(self, row: int, line: dict[str, Any] | str) -> FoundRow:
        if isinstance(line, str):
            return FoundRow(f"row {row}", fault=line)
        record = {key: value for key, value in line.items() if key != "features"}
        return FoundRow(f"row {row}", self.column.of(line.get(self.column.name)), record=record)

    def _with_tree(self) -> Iterator[FoundRow]:
        lines, ahead = tee(self._lines)
        names = (self._name(number) for number, _ in ahead)
        # One file a row: a few of them are on their way at once.
        stored = read_ahead(self._storage, names)
        for row, ((number, line), data) in enumerate(zip(lines, stored, strict=True)):
            found = self._prompt(row, line)
            if data is None and found.fault is None:
                where = self._storage.join(self._name(number))
                found = replace(found, fault=f"row {row} has no features: {where} is missing")
            yield replace(found, features_TD=None if data is None else _stored_matrix(data))

    def _has_tree(self) -> bool:
        return bool(self._stem) and self._storage.exists(self._name(1))

    def _name(self, number: int) -> str:
        """Of the file of features of a line."""
        return f"{self._stem}/{number - 1}.npy"


def _lines(file: Any) -> Iterator[_Line]:
    """All lines that are not blank."""
    is_first = True
    for number, line in enumerate(io.BufferedReader(file, _BUFFER_BYTES), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, _object(number, line, is_first)
            is_first = False


def _object(number: int, line: bytes, is_first: bool) -> dict[str, Any] | str:
    """The object in a line, or what is wrong with it; of the first one, what the file may be."""
    try:
        row = json_value(line.decode())
    except ValueError as error:
        refusal = f"line {number} is not JSON"
        told = explained(refusal, line, error, "JSON") if is_first else None
        return told or f"{refusal} ({one_line(error)})"
    return row if isinstance(row, dict) else f"line {number} is no object"


def _matrix(value: Any) -> npt.NDArray[np.float32]:
    """An array float32 [T, D]; an empty one [0] for what is no matrix."""
    try:
        features_TD = np.asarray(value)
    except ValueError:
        return _NO_MATRIX
    is_matrix = features_TD.ndim == 2 and features_TD.dtype.kind in "iuf"
    return features_TD.astype(np.float32) if is_matrix else _NO_MATRIX


def _stored_matrix(data: bytes) -> npt.NDArray[np.float32]:
    """The same of a .npy of one matrix, [1, T, D]."""
    try:
        features_1TD = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return _NO_MATRIX
    is_one = isinstance(features_1TD, np.ndarray) and features_1TD.shape[:1] == (1,)
    return _matrix(features_1TD[0]) if is_one else _NO_MATRIX

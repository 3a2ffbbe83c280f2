"""A file of captions, read as a stream: Parquet or JSON lines, or what benchmarks have.

Its columns are `index`, `caption` and perhaps `features`; rows ascend by index from 0 without gaps,
so whatever is wrong with their order shows while a few of them are in memory. Files of prompts have
no index (ddray.storage.prompt_file).

Shapes: T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

import codecs
import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, StorageError, one_line
from ddray.file_kind import explained, json_value
from ddray.storage import open_storage
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.prompt_file import TEXT_ENDINGS, column_of, json_prompts, text_prompts

# A row of 120 positions of flan-t5-xl is a megabyte.
_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20
_TAG = re.compile(r"<[^<>]*>")
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_QUOTES = str.maketrans({**dict.fromkeys("´«»“”¨", '"'), **dict.fromkeys("‘’", "'")})


def clean_caption(caption: str) -> str:
    """A caption as the encoder's training data had it: lower case, without markup or addresses.

    Published models saw captions from the web through a longer list of rules, for the debris of
    product pages; they leave a sentence that somebody wrote as this does.
    """
    text = html.unescape(html.unescape(caption)).lower()
    text = _TAG.sub(" ", _ADDRESS.sub(" ", text)).translate(_QUOTES)
    return " ".join(text.split())


def no_text(caption: str) -> str | None:
    """What in a caption neither files nor encoders take; None where all is well."""
    # Half a surrogate pair is legal in JSON and in Python, and has no UTF-8.
    if _HALF_PAIR.search(caption):
        return (
            "holds half a surrogate pair, as of an emoji that was cut; cut texts between "
            "characters, or leave it out"
        )
    return "holds a NUL character; leave it out" if "\0" in caption else None


@dataclass(frozen=True)
class CaptionRow:
    """One row of a file of captions.

    Attributes:
        index: sample index.
        caption: its text.
        features_TD: float32 [T, D]; None where the file has none, or they were not asked for.
        record: all that a file of prompts says of it, as a JSON object; None in other files.
    """

    index: int
    caption: str
    features_TD: npt.NDArray[np.float32] | None
    record: str | None = None


class CaptionFile:
    """A file of captions, checked and read as a stream.

    Args:
        uri: path or s3:// URI that ends in .parquet or .jsonl; or in .txt, .tsv or .csv.
        length: T at most, the caption positions of the teacher.
        width: D, the teacher's caption_dim.
        column: of the captions, in a file of prompts; None = where they usually are.
        each: rows that each row of the file stands for, one after the other.

    Attributes:
        uri: the same, absolute.
        has_features: whether its captions come with features.

    Raises:
        ConfigError: for another ending, or columns that are missing or of another type.
        StorageError: if the file cannot be read.
    """

    def __init__(
        self, uri: str, *, length: int, width: int, column: str | None = None, each: int = 1
    ) -> None:
        self.uri = open_storage(uri).uri
        self._length, self._width, self._column, self._each = length, width, column, each
        if not self.uri.endswith((".parquet", ".jsonl", *TEXT_ENDINGS)):
            raise ConfigError(f"captions={uri!r} must end in .parquet, .jsonl, .txt, .tsv or .csv")
        self._is_parquet = self.uri.endswith(".parquet")
        if self._is_parquet and column is not None:
            raise ConfigError(
                f"caption_column={column!r} is of files of prompts; Parquet has index and caption"
            )
        names: list[str] = []
        self._is_prompts = self.uri.endswith(TEXT_ENDINGS)
        with _errors(self.uri), _open(self.uri) as file:
            if self._is_parquet:
                names = _checked_schema(_parquet(file).schema_arrow)
            elif self._is_prompts:
                next(text_prompts(file, self.uri[-4:], column), None)
            else:
                names = list(next(_json_lines(file), {}))
                self._is_prompts = bool(names) and (column is not None or "index" not in names)
                if self._is_prompts:
                    column_of(names, column)
        self.has_features = "features" in names and not self._is_prompts

    def rows(self, count: int, *, features: bool = True) -> Iterator[CaptionRow]:
        """The first `count` rows; whatever comes behind them is not looked at.

        Args:
            count: rows that are needed.
            features: whether to read them, where the file has some.

        Raises:
            ConfigError: for an index that is missing, double or out of order, a caption that is
                empty or no text, features of another shape, or too few rows.
            StorageError: if the file cannot be read to the end.
        """
        number, needed = -1, -(-count // self._each)
        read = self._read(needed, features and self.has_features)
        for number, row in enumerate(islice(read, needed)):
            problem = _misplaced(row.index, number) or self._unfit(row)
            if problem:
                raise ConfigError(f"captions {self.uri}: {problem}")
            first = number * self._each
            for index in range(first, min(first + self._each, count)):
                yield replace(row, index=index)
        if number + 1 < needed:
            each = f" of {self._each} images each" if self._each > 1 else ""
            raise ConfigError(f"captions {self.uri}: {number + 1} rows{each}, but count={count}")

    def check(self, count: int) -> None:
        """Read the first `count` rows without their features, to refuse them before work starts.

        Raises:
            ConfigError: as `rows`.
            StorageError: as `rows`.
        """
        for _ in self.rows(count, features=False):
            pass

    def _read(self, count: int, features: bool) -> Iterator[CaptionRow]:
        with _errors(self.uri), _open(self.uri) as file:
            if self._is_parquet:
                yield from _parquet_rows(_parquet(file), count, features)
                return
            if self._is_prompts:
                prompts = (
                    json_prompts(_json_lines(file), self._column)
                    if self.uri.endswith(".jsonl")
                    else text_prompts(file, self.uri[-4:], self._column)
                )
                for number, prompt in enumerate(prompts):
                    yield CaptionRow(number, prompt.text, None, prompt.record)
                return
            for row in _json_lines(file, "index", "caption"):
                if ("features" in row) != self.has_features:
                    raise ConfigError(
                        f"features must be in every line or in none; see index {row['index']}"
                    )
                yield CaptionRow(
                    _json_index(row), _json_caption(row), _json_features(row) if features else None
                )

    def _unfit(self, row: CaptionRow) -> str | None:
        """What the teacher, its encoder or a shard would refuse in a row."""
        if reason := no_text(row.caption):
            return f"the caption of index {row.index} {reason}"
        if row.features_TD is None:
            empty = not self.has_features and not clean_caption(row.caption)
            return f"the caption of index {row.index} is empty" if empty else None
        if row.features_TD.ndim != 2:
            return f"the features of index {row.index} are no T lists of D numbers"
        length, width = row.features_TD.shape
        if not 1 <= length <= self._length or width != self._width:
            return (
                f"the features of index {row.index} are {length} x {width}; the teacher takes 1 to "
                f"{self._length} positions of width {self._width}"
            )
        if not np.isfinite(row.features_TD).all():
            return f"the features of index {row.index} are not all finite"
        return None


def _misplaced(index: int, number: int) -> str | None:
    """What is wrong with the index of row `number`, all rows before it being right."""
    rule = "rows must ascend by index from 0 without gaps"
    if index > number:
        return f"index {number} is missing: row {number} has index {index}; {rule}"
    if index < 0:
        return f"index {index} at row {number}; {rule}"
    return f"index {index} twice at row {number}; {rule}" if index < number else None


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Names the file in whatever goes wrong while it is read."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"captions {uri}: {exc}") from exc
    except FileNotFoundError as exc:
        raise StorageError(f"cannot read captions {uri}: no such file") from exc
    except (pa.ArrowException, UnicodeDecodeError) as exc:
        refusal = f"captions {uri} is damaged or no Parquet"
        raise ConfigError(explained(refusal, _head(uri), exc, "Parquet")) from exc
    except OSError as exc:
        raise StorageError(f"cannot read captions {uri}: {one_line(exc)}") from exc


def _open(uri: str) -> Any:
    """The file for reading from anywhere in it, by pyarrow: our own storage reads whole files."""
    filesystem, path = arrow_filesystem(uri)
    return filesystem.open_input_file(path)


def _head(uri: str) -> bytes:
    """Its beginning, which names what it is; short of that, anything that says nothing."""
    try:
        with _open(uri) as file:
            return bytes(file.read(_BUFFER_BYTES))
    except OSError:
        return b"PAR1"


def _parquet(file: Any) -> Any:
    # A buffered stream, or a whole row group would be in memory.
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)


def _checked_schema(schema: Any) -> list[str]:
    """Names of the columns, which are of the right types."""
    for name, rule, fits in (
        ("index", "integers", pa.types.is_integer),
        ("caption", "strings", lambda kind: kind in (pa.string(), pa.large_string())),
        ("features", "lists of T lists of D floats", _is_matrix),
    ):
        if name not in schema.names:
            if name == "features":
                continue
            raise ConfigError(f"there is no column {name!r}; it has {', '.join(schema.names)}")
        if not fits(schema.field(name).type):
            raise ConfigError(f"column {name!r} is {schema.field(name).type}; {rule} are needed")
    return list(schema.names)


def _is_matrix(kind: Any) -> bool:
    def is_list(kind: Any) -> bool:
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return any(test(kind) for test in lists)

    inner = kind.value_type if is_list(kind) else None
    return inner is not None and is_list(inner) and pa.types.is_floating(inner.value_type)


def _parquet_rows(file: Any, count: int, features: bool) -> Iterator[CaptionRow]:
    columns = ["index", "caption"] + ["features"] * features
    number = 0
    for whole in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
        batch = whole.slice(0, count - number)
        for name in columns:
            nulls = np.flatnonzero(batch.column(name).is_null())
            if len(nulls):
                raise ConfigError(f"row {number + nulls[0]} has no {name}")
        texts = _texts(batch.column("caption"), number)
        given = matrices(batch.column("features")) if features else [None] * len(texts)
        yield from map(CaptionRow, batch.column("index").to_pylist(), texts, given)
        number += len(texts)
        if number == count:
            return


def _texts(captions: Any, first: int) -> list[str]:
    """The texts of some rows; `first` is the number of the first of them."""
    try:
        texts: list[str] = captions.to_pylist()
    except UnicodeDecodeError:
        for number, data in enumerate(captions.cast(pa.large_binary()).to_pylist(), first):
            try:
                data.decode()
            except UnicodeDecodeError as exc:
                raise ConfigError(f"the caption of row {number} is no UTF-8 ({exc})") from exc
        raise
    return texts


def matrices(rows: Any) -> list[npt.NDArray[np.float32]]:
    """Features of each row of a column of lists of lists.

    Returns:
        Arrays float32 [T, D]; an empty one [0] for a row that is no matrix.
    """
    positions = rows.flatten()
    values = positions.flatten()
    widths = np.unique(pc.list_value_length(positions.drop_null()))
    if positions.null_count or values.null_count or len(widths) > 1:
        if len(rows) == 1:
            return [np.empty(0, np.float32)]
        return [matrix for i in range(len(rows)) for matrix in matrices(rows.slice(i, 1))]
    width = int(widths[0]) if len(widths) else 0
    matrix = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    ends = np.cumsum(pc.list_value_length(rows).to_numpy(zero_copy_only=False))
    return np.split(matrix.reshape(int(ends[-1]), width), ends[:-1])


def _json_lines(file: Any, *needed: str) -> Iterator[dict[str, Any]]:
    """The objects of all lines that are not blank, with the keys that they need."""
    is_first = True
    for number, line in enumerate(io.BufferedReader(file, _BUFFER_BYTES), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json_value(line.decode())
        except ValueError as exc:
            refusal = f"line {number} is not JSON"
            if is_first:
                raise ConfigError(explained(refusal, line, exc, "JSON")) from exc
            raise ConfigError(f"{refusal} ({one_line(exc)})") from exc
        if not isinstance(row, dict) or not row.keys() >= {*needed}:
            keys = " with index and caption" if needed else ""
            raise ConfigError(f"line {number} is no object{keys}")
        is_first = False
        yield row


def _json_index(row: dict[str, Any]) -> int:
    index = row["index"]
    if not isinstance(index, int) or isinstance(index, bool):
        raise ConfigError(f"index {index!r} is no integer")
    return index


def _json_caption(row: dict[str, Any]) -> str:
    caption = row["caption"]
    if not isinstance(caption, str):
        raise ConfigError(f"caption {caption!r} of index {row['index']} is no string")
    return caption


def _json_features(row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """An array float32 [T, D]; an empty one [0] for what is no matrix."""
    try:
        features_TD = np.asarray(row["features"])
    except ValueError:
        return np.empty(0, np.float32)
    is_matrix = features_TD.ndim == 2 and features_TD.dtype.kind in "iuf"
    return features_TD.astype(np.float32) if is_matrix else np.empty(0, np.float32)

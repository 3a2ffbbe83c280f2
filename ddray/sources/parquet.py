"""Parquet files with a column of encoded images, as Hugging Face's `datasets` writes them.

A row group is the least that can be asked for: files of few large ones are read through from the
beginning of the group to the rows that are wanted.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, StorageError, one_line
from ddray.file_kind import explained
from ddray.sources.base import Content, ImageSource
from ddray.sources.listing import Listing
from ddray.sources.pixels import PixelRules, PixelsError
from ddray.storage.base import BUFFER_BYTES, Storage

_ROWS_AT_ONCE, _READERS = 16, 8
_PREFERRED = "image"


class ParquetSource(ImageSource):
    """Images of a column: files in the order of their names, rows in that of their file.

    Args:
        listing: that has the files.
        rules: what is done to every image.
        column: which; None = the only one of images, or the one that is called "image".

    Raises:
        ConfigError: if there is no such column, it holds no images, or a file is damaged.
        StorageError: if a file cannot be read.
    """

    kind: ClassVar[str] = "parquet"

    def __init__(self, listing: Listing, rules: PixelRules, column: str | None = None):
        self._storage, self._files = listing.storage, listing.names("parquet")
        self._sizes = [listing.files[name].size for name in self._files]
        with ThreadPoolExecutor(_READERS) as readers:
            footers = [*readers.map(self._footer, range(len(self._files)))]
        self._column = column or _image_column(self._where(0), footers[0][0])
        for file, (schema, _) in enumerate(footers):
            _check_column(self._where(file), schema, self._column)
        groups = [
            (file, group, rows)
            for file, (_, sizes) in enumerate(footers)
            for group, rows in enumerate(sizes)
        ]
        self._group = [(file, group) for file, group, _ in groups]
        # The first row of each group, and behind the last.
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self._file_starts = np.cumsum([0, *(sum(sizes) for _, sizes in footers)])
        facts = [
            [name, *listing.files[name], sizes, self._column]
            for name, (_, sizes) in zip(self._files, footers, strict=True)
        ]
        super().__init__(listing.uri, int(self._starts[-1]), facts, rules)
        if not self.count:
            raise ConfigError(f"{listing.uri}: its {len(footers)} Parquet files hold no rows")

    def name(self, row: int) -> str:
        """Path of the file, and the row in it."""
        file = int(np.searchsorted(self._file_starts, row, "right")) - 1
        return f"{self._files[file]} row {row - self._file_starts[file]}"

    def _contents(self, rows: Sequence[int]) -> Generator[Content, None, None]:
        numbers = np.searchsorted(self._starts, np.asarray(rows, np.int64), "right") - 1
        for number, wanted in groupby(zip(numbers.tolist(), rows, strict=True), itemgetter(0)):
            start = int(self._starts[number])
            yield from self._of_group(number, [row - start for _, row in wanted])

    def _of_group(self, number: int, wanted: list[int]) -> Iterator[Content]:
        """Some rows of a row group."""
        file, group = self._group[number]
        done = 0
        with _errors(self._storage, self._files[file]), self._open(file) as opened:
            for batch in opened.iter_batches(
                _ROWS_AT_ONCE, row_groups=[group], columns=[self._column], use_threads=False
            ):
                column = batch.column(0)
                yield from (
                    _content(column[k - done]) for k in wanted if 0 <= k - done < len(batch)
                )
                done += len(batch)
                if done > wanted[-1]:
                    return

    def _footer(self, file: int) -> tuple[Any, list[int]]:
        """Schema, and the rows of each row group."""
        with _errors(self._storage, self._files[file]), self._open(file) as opened:
            known = opened.metadata
            sizes = [known.row_group(k).num_rows for k in range(known.num_row_groups)]
            return opened.schema_arrow, sizes

    def _open(self, file: int) -> Any:
        stream = self._storage.open_file(self._files[file], self._sizes[file])
        # A buffered stream, or a whole row group would be in memory.
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)

    def _where(self, file: int) -> str:
        return self._storage.join(self._files[file])


def _content(value: Any) -> Content:
    content = value.as_py()
    if isinstance(content, dict):
        if content["bytes"] is None and content.get("path"):
            return PixelsError(f"has no bytes, only the path {content['path']}")
        content = content["bytes"]
    return PixelsError("has no image") if content is None else content


def _holds_images(kind: Any) -> bool:
    """Whether a type is binary, or Hugging Face's struct of it."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(where: str, schema: Any) -> str:
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if len(fitting) == 1 or _PREFERRED in fitting:
        return str(_PREFERRED if _PREFERRED in fitting else fitting[0])
    if fitting:
        names = ", ".join(fitting)
        raise ConfigError(f"{where} has images in {names}; say which by --column")
    raise ConfigError(f"{where} has no column of images; it has {_columns(schema)}")


def _check_column(where: str, schema: Any, column: str) -> None:
    at = schema.get_field_index(column)
    if at < 0:
        raise ConfigError(f"{where} has no column {column!r}; it has {_columns(schema)}")
    if not _holds_images(schema.field(at).type):
        raise ConfigError(
            f"{where}: column {column!r} is {schema.field(at).type}; image files are needed, "
            "binary or a struct of bytes and path"
        )


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


@contextmanager
def _errors(storage: Storage, name: str) -> Iterator[None]:
    """Names the file in whatever goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowException, ValueError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        head = storage.read_range(name, 0, 4096)
        refusal = f"{storage.join(name)} is damaged or no Parquet"
        raise ConfigError(explained(refusal, head, error, "Parquet")) from error
    except OSError as error:
        raise StorageError(f"cannot read {storage.join(name)}: {one_line(error)}") from error

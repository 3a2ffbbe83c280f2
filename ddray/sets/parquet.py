"""Parquet files of shards: columns of labels and tokens, written byte for byte alike, read checked.

Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ShardError
from ddray.file_kind import kind_of
from ddray.sets.plan import SetPlan
from ddray.sets.sharded_set import check_stamp

# What pyarrow raises on a truncated or damaged file; MemoryError: a length that is garbage.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)


def num_rows(data: bytes) -> int | None:
    """Return the number of rows that a shard's footer tells; None if it cannot be read."""
    try:
        rows: int = pq.read_metadata(pa.BufferReader(data)).num_rows
    except _UNREADABLE:
        return None
    return rows


def label_field(plan: SetPlan) -> tuple[str, Any]:
    """Name and type of the column that says what a row was asked for by."""
    return ("label", pa.int32()) if plan.conditioning == "class" else ("caption", pa.string())


def tokens_type(plan: SetPlan) -> Any:
    """Type of the column of tokens."""
    return pa.list_(pa.from_numpy_dtype(plan.token_dtype), plan.num_tokens)


def tokens_column(plan: SetPlan, tokens: npt.NDArray[Any]) -> Any:
    """Tokens, integers [N, L], as a column."""
    flat = pa.array(np.ascontiguousarray(tokens, dtype=plan.token_dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, plan.num_tokens)


def tokens_matrix(plan: SetPlan, column: Any) -> npt.NDArray[Any]:
    """A column of tokens as an array [N, L] of its own."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.array(flat.reshape(-1, plan.num_tokens))


def label_bytes(plan: SetPlan, label: npt.NDArray[Any]) -> bytes:
    """What is hashed of labels: little-endian int32, or captions as a JSON list."""
    if plan.conditioning == "class":
        return label.astype("<i4").tobytes()
    return json.dumps(label.tolist()).encode()


def write_table(
    table: Any, *, packed: Sequence[str], compression: str, dictionary: Sequence[str] = ()
) -> bytes:
    """A table as a Parquet file with page checksums, the same bytes for the same table.

    Args:
        table: what to write.
        packed: columns of integers that are delta bit-packed.
        compression: of the pages.
        dictionary: columns of few values.
    """
    sink = io.BytesIO()
    # Parquet has no 16-bit integers. Delta packing stores just the bits in use, where plain
    # values would take 32 each and a dictionary costs its own size in every small shard.
    pq.write_table(
        table,
        sink,
        compression=compression,
        use_dictionary=list(dictionary),
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
        write_page_checksum=True,
    )
    return sink.getvalue()


def read_table(plan: SetPlan, k: int, data: bytes, schema: Any) -> tuple[Any, str]:
    """The table of a Parquet file that says it is shard `k`, and the hash its rows must have.

    Raises:
        ShardError: if it says it is another, has other columns, or is damaged.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata = {
            key.decode(): value.decode()
            for key, value in (file.schema_arrow.metadata or {}).items()
            if key.startswith(b"ddray.")
        }
        expected = check_stamp(plan, k, metadata, file.metadata.num_rows)
        if not file.schema_arrow.equals(schema):
            raise ShardError(f"the columns are {_names(file.schema_arrow)}, not those of the plan")
        return file.read(use_threads=False), expected
    except _UNREADABLE as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0].rstrip(". ")
        raise ShardError(damaged(data, reason, "Parquet")) from exc


def damaged(data: bytes, reason: str, format_name: str) -> str:
    """What is wrong with a shard that cannot be read: what it is instead, or the reason."""
    kind = kind_of(data)
    told = kind.name if kind and format_name.lower() not in kind.name.lower() else reason
    return f"damaged or truncated ({told})"


def _names(schema: Iterable[Any]) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema)

"""One shard of trajectories as a Parquet file, format 1: rows to bytes and back, checked.

Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ShardError
from ddray.sets.plan import SetPlan
from ddray.sets.sharded_set import check_stamp, stamp
from ddray.sets.trajectories.plan import Plan

# Columns of a shard: index [N], label [N] (captions if the teacher takes text), tokens [N, L].
Rows = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]

# What pyarrow raises on a truncated or damaged file; MemoryError: a length that is garbage.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)


def num_rows(data: bytes) -> int | None:
    """Return the number of rows that a shard's footer tells; None if it cannot be read."""
    try:
        rows: int = pq.read_metadata(pa.BufferReader(data)).num_rows
    except _UNREADABLE:
        return None
    return rows


def check_rows(
    plan: Plan,
    k: int,
    index: npt.NDArray[Any],
    label: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
) -> None:
    """Refuse rows that are not those of shard `k`.

    Raises:
        ShardError: naming what differs.
    """
    expected = plan.shard_range(k)
    shape = (len(expected), plan.num_tokens)
    if tokens.shape != shape or index.shape != shape[:1] or label.shape != shape[:1]:
        raise ShardError(
            f"index, label, tokens have shapes {index.shape}, {label.shape}, {tokens.shape}; "
            f"the plan has {shape[:1]}, {shape[:1]}, {shape}"
        )
    _check_range("index", index, expected.start, expected.stop)
    if not np.array_equal(index, np.arange(expected.start, expected.stop)):
        raise ShardError(f"index is not {expected.start} to {expected.stop - 1} in order")
    _check_range("tokens", tokens, 0, plan.vocab_size)
    if plan.conditioning == "class":
        _check_range("label", label, 0, plan.num_classes)
    elif not all(isinstance(caption, str) for caption in label.tolist()):
        raise ShardError("captions must be strings")


def _check_range(name: str, values: npt.NDArray[Any], start: int, stop: int) -> None:
    if values.dtype.kind not in "iu":
        raise ShardError(f"{name} has dtype {values.dtype}; integers are needed")
    least, most = int(values.min()), int(values.max())
    if least < start or most >= stop:
        raise ShardError(f"{name} reaches from {least} to {most}; allowed is {start} to {stop - 1}")


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


def label_bytes(plan: SetPlan, label: npt.NDArray[Any]) -> bytes:
    """What is hashed of labels: little-endian int32, or captions as a JSON list."""
    if plan.conditioning == "class":
        return label.astype("<i4").tobytes()
    return json.dumps(label.tolist()).encode()


def _schema(plan: Plan) -> Any:
    return pa.schema([("index", pa.int64()), label_field(plan), ("tokens", tokens_type(plan))])


def _rows_sha256(plan: Plan, rows: Rows) -> str:
    """Hash the columns as little-endian bytes, captions as a JSON list."""
    index, label, tokens = rows
    digest = hashlib.sha256(index.astype("<i8").tobytes())
    digest.update(label_bytes(plan, label))
    digest.update(tokens.astype(plan.token_dtype).tobytes())
    return digest.hexdigest()


def encode(
    plan: Plan,
    k: int,
    index: npt.NDArray[Any],
    label: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
) -> bytes:
    """Return the Parquet file of checked rows, the same bytes for the same rows.

    Args:
        plan: of the set.
        k: which shard.
        index: integers [N].
        label: integers [N], or captions.
        tokens: integers [N, L].
    """
    schema = _schema(plan)
    columns = [
        pa.array(index, type=schema.field(0).type),
        pa.array(label.tolist(), type=schema.field(1).type),
        tokens_column(plan, tokens),
    ]
    metadata = stamp(plan, k, _rows_sha256(plan, (index, label, tokens)))
    table = pa.Table.from_arrays(columns, schema=schema.with_metadata(metadata))
    packed = ["index", "tokens.list.element"] + ["label"] * (plan.conditioning == "class")
    return write_table(table, packed=packed, compression="zstd")


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


def decode(plan: Plan, k: int, data: bytes) -> Rows:
    """Return the rows of a Parquet file after checking that they are those of shard `k`.

    Raises:
        ShardError: if they are not, or the file is damaged.
    """
    table, expected = read_table(plan, k, data, _schema(plan))
    rows = _columns(plan, table)
    if _rows_sha256(plan, rows) != expected:
        raise ShardError("the rows do not fit their sha256")
    check_rows(plan, k, *rows)
    return rows


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
        raise ShardError(f"damaged or truncated ({reason})") from exc


def _columns(plan: Plan, table: Any) -> Rows:
    index, label, tokens = (column.combine_chunks() for column in table.columns)
    # Copies, because Arrow's memory is read-only and torch warns of such arrays.
    return (
        np.array(index.to_numpy(zero_copy_only=False)),
        np.array(label.to_numpy(zero_copy_only=False)),
        tokens_matrix(plan, tokens),
    )


def tokens_matrix(plan: SetPlan, column: Any) -> npt.NDArray[Any]:
    """A column of tokens as an array [N, L] of its own."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.array(flat.reshape(-1, plan.num_tokens))


def _names(schema: Iterable[Any]) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema)

"""One shard as a Parquet file, format 1: rows to bytes and back, checked against the plan.

Imports from ddray the plan and the errors; needs numpy and pyarrow, no torch. Legend: N rows of a
shard, L tokens each.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ShardError
from ddray.plan import Plan

_HASH_KEY, _SHARD_KEY, _ROWS_KEY = b"ddray.plan_hash", b"ddray.shard", b"ddray.rows_sha256"

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


def _schema(plan: Plan) -> Any:
    is_class = plan.conditioning == "class"
    tokens = pa.list_(pa.from_numpy_dtype(plan.token_dtype), plan.num_tokens)
    return pa.schema(
        [
            ("index", pa.int64()),
            ("label", pa.int32()) if is_class else ("caption", pa.string()),
            ("tokens", tokens),
        ]
    )


def _rows_sha256(plan: Plan, rows: Rows) -> bytes:
    """Hash the columns as little-endian bytes, captions as a JSON list."""
    index, label, tokens = rows
    digest = hashlib.sha256(index.astype("<i8").tobytes())
    if plan.conditioning == "class":
        digest.update(label.astype("<i4").tobytes())
    else:
        digest.update(json.dumps(label.tolist()).encode())
    digest.update(tokens.astype(plan.token_dtype).tobytes())
    return digest.hexdigest().encode()


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
    metadata = {
        _HASH_KEY: plan.hash.encode(),
        _SHARD_KEY: str(k).encode(),
        _ROWS_KEY: _rows_sha256(plan, (index, label, tokens)),
    }
    schema = _schema(plan)
    flat = pa.array(np.ascontiguousarray(tokens, dtype=plan.token_dtype).reshape(-1))
    columns = [
        pa.array(index, type=schema.field(0).type),
        pa.array(label.tolist(), type=schema.field(1).type),
        pa.FixedSizeListArray.from_arrays(flat, plan.num_tokens),
    ]
    table = pa.Table.from_arrays(columns, schema=schema.with_metadata(metadata))
    sink = io.BytesIO()
    # Parquet has no 16-bit integers. Delta packing stores just the bits in use, where plain
    # values would take 32 each and a dictionary costs its own size in every small shard.
    packed = ["index", "tokens.list.element"] + ["label"] * (plan.conditioning == "class")
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode(plan: Plan, k: int, data: bytes) -> Rows:
    """Return the rows of a Parquet file after checking that they are those of shard `k`.

    Raises:
        ShardError: if they are not, or the file is damaged.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        _check_metadata(plan, k, metadata, file.metadata.num_rows)
        if not file.schema_arrow.equals(_schema(plan)):
            raise ShardError(f"the columns are {_names(file.schema_arrow)}, not those of the plan")
        rows = _columns(plan, file.read(use_threads=False))
    except _UNREADABLE as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0].rstrip(". ")
        raise ShardError(f"damaged or truncated ({reason})") from exc
    if _rows_sha256(plan, rows) != metadata[_ROWS_KEY]:
        raise ShardError("the rows do not fit their sha256")
    check_rows(plan, k, *rows)
    return rows


def _check_metadata(plan: Plan, k: int, metadata: dict[bytes, bytes], num_rows: int) -> None:
    if not metadata.keys() >= {_HASH_KEY, _SHARD_KEY, _ROWS_KEY}:
        raise ShardError("not a shard that ddray wrote: its metadata names no plan")
    found_hash = metadata[_HASH_KEY].decode()
    if found_hash != plan.hash:
        raise ShardError(f"it belongs to plan {found_hash[:12]}, the set to {plan.hash[:12]}")
    if metadata[_SHARD_KEY] != str(k).encode():
        raise ShardError(f"it is shard {metadata[_SHARD_KEY].decode()}, renamed")
    expected = len(plan.shard_range(k))
    if num_rows != expected:
        raise ShardError(f"it has {num_rows} of {expected} rows")


def _columns(plan: Plan, table: Any) -> Rows:
    index, label, tokens = (column.combine_chunks() for column in table.columns)
    matrix = tokens.flatten().to_numpy(zero_copy_only=False).reshape(-1, plan.num_tokens)
    # Copies, because Arrow's memory is read-only and torch warns of such arrays.
    return (
        np.array(index.to_numpy(zero_copy_only=False)),
        np.array(label.to_numpy(zero_copy_only=False)),
        np.array(matrix),
    )


def _names(schema: Iterable[Any]) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema)

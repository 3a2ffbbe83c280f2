"""One shard of trajectories as a Parquet file, format 1: rows to bytes and back, checked.

Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ShardError, one_line
from ddray.sets.parquet import (
    label_bytes,
    label_field,
    read_table,
    tokens_column,
    tokens_matrix,
    tokens_type,
    write_table,
)
from ddray.sets.sharded_set import stamp
from ddray.sets.trajectories.plan import TrajectoryPlan

# Columns of a shard: index [N], label [N] (captions if the teacher takes text), tokens [N, L].
Rows = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]


def check_rows(
    plan: TrajectoryPlan,
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


def _schema(plan: TrajectoryPlan) -> Any:
    return pa.schema([("index", pa.int64()), label_field(plan), ("tokens", tokens_type(plan))])


def _rows_sha256(plan: TrajectoryPlan, rows: Rows) -> str:
    """Hash the columns as little-endian bytes, captions as a JSON list."""
    index, label, tokens = rows
    digest = hashlib.sha256(index.astype("<i8").tobytes())
    digest.update(label_bytes(plan, label))
    digest.update(tokens.astype(plan.token_dtype).tobytes())
    return digest.hexdigest()


def encode(
    plan: TrajectoryPlan,
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


def decode(plan: TrajectoryPlan, k: int, data: bytes) -> Rows:
    """Return the rows of a Parquet file after checking that they are those of shard `k`.

    Raises:
        ShardError: if they are not, or the file is damaged.
    """
    table, expected = read_table(plan, k, data, _schema(plan))
    try:
        rows = _columns(plan, table)
    except ValueError as exc:  # nulls, which we never write
        raise ShardError(f"damaged or truncated ({one_line(exc)})") from exc
    if _rows_sha256(plan, rows) != expected:
        raise ShardError("the rows do not fit their sha256")
    check_rows(plan, k, *rows)
    return rows


def _columns(plan: TrajectoryPlan, table: Any) -> Rows:
    index, label, tokens = (column.combine_chunks() for column in table.columns)
    # Copies, because Arrow's memory is read-only and torch warns of such arrays.
    return (
        np.array(index.to_numpy(zero_copy_only=False)),
        np.array(label.to_numpy(zero_copy_only=False)),
        tokens_matrix(plan, tokens),
    )

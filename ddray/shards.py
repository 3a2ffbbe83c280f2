"""Trajectory sets, format 1: shards in Parquet, what is missing, what is damaged.

Imports from ddray the plan, the errors and the storage; needs numpy and pyarrow, no torch.

A set is `manifest.json`, which is its plan (ddray.plan), and `shards/shard-00000.parquet` and so
on. Shard k holds the rows of indices [k * shard_rows, (k + 1) * shard_rows), the last one fewer.
Noise is not stored: it is a function of (seed, index). Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, ShardError
from ddray.plan import NOT_HASHED, Plan
from ddray.storage import NotFoundError, Storage, open_storage, read_ahead

_MANIFEST = "manifest.json"
_SHARDS = "shards/"
# No Parquet file is shorter: two magic numbers and the length of the footer.
_LEAST_PARQUET_BYTES = 12
_HASH_KEY, _SHARD_KEY, _ROWS_KEY = b"ddray.plan_hash", b"ddray.shard", b"ddray.rows_sha256"

# Columns of a shard: index [N], label [N] (captions if the teacher takes text), tokens [N, L].
Rows = tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class Listing:
    """What one listing of a set's storage shows, without reading a shard.

    Attributes:
        sizes: Shard -> bytes, of the shards that are there.
        missing: Shards that are still to be written.
        unexpected: Names below shards/ that the plan does not have.
    """

    sizes: dict[int, int]
    missing: list[int]
    unexpected: list[str]


@dataclass(frozen=True)
class VerifyReport:
    """What `TrajectorySet.verify` found.

    Attributes:
        num_shards: Shards that the plan asks for.
        missing: Shards that do not exist, or that the set's extension made too short.
        damaged: Shard -> reason.
        rows: Sound rows.
        unexpected: Names below shards/ that the plan does not have; a reader that takes
            all of shards/ would count their rows too.
    """

    num_shards: int
    missing: list[int]
    damaged: dict[int, str]
    rows: int
    unexpected: list[str]

    @property
    def ok(self) -> bool:
        """Whether every index of the plan is there exactly once."""
        return not (self.missing or self.damaged or self.unexpected)


class TrajectorySet:
    """Reads and writes the shards of one plan at one URI. Pickles, so that Ray can ship it.

    Attributes:
        plan: The plan.
        storage: Where the set lies.
        uri: The same as a URI.
    """

    def __init__(self, storage: Storage, plan: Plan) -> None:
        """Take what `create` and `open` made sure of; call those instead."""
        self.storage = storage
        self.plan = plan
        self.uri = storage.uri

    @classmethod
    def create(cls, uri: str, plan: Plan) -> TrajectorySet:
        """Start a set, go on with one of the same plan, or extend it to a larger count.

        An extension rewrites the manifest only. A last shard that was short now has too
        few rows and counts as missing; all others stay.

        Raises:
            ConfigError: If the set at `uri` has another plan or a larger count.
            ShardError: If `uri` holds something else.
            StorageError: If `uri` cannot be read and written.
        """
        storage = open_storage(uri)
        existing = _read_manifest(storage)
        if existing is None:
            if storage.list(_SHARDS):
                raise ShardError(
                    f"{storage.join('shards')} holds files, but there is no {_MANIFEST}; "
                    "restore it, delete the shards, or choose another URI"
                )
            plan = replace(plan, earlier_counts=())
            if storage.write(_MANIFEST, plan.to_json().encode(), if_absent=True):
                return cls(storage, plan)
            # Another driver was faster: its manifest counts.
            existing = _read_manifest(storage) or plan
        merged = _merged(existing, plan, storage.uri)
        storage.check_writable()
        if merged.count != existing.count:
            storage.write(_MANIFEST, merged.to_json().encode())
        return cls(storage, merged)

    @classmethod
    def open(cls, uri: str) -> TrajectorySet:
        """Open a set for reading, complete or not.

        Raises:
            ShardError: If there is no set at `uri`, or it is not of this format.
            StorageError: If `uri` cannot be read.
        """
        storage = open_storage(uri)
        plan = _read_manifest(storage)
        if plan is None:
            raise ShardError(
                f"no trajectory set at {storage.uri}: it has no {_MANIFEST}; "
                "check the URI, or run `ddray sample` first"
            )
        return cls(storage, plan)

    def listing(self) -> Listing:
        """Return what is there and what is not, by listing the storage once.

        Shards appear whole or not at all, so a name in the listing is enough, with one
        exception: a shard that was the last one of an earlier count may still be short.
        Only those, one for each extension, are read, and count as missing unless the
        length in their footer is the plan's. Damage elsewhere is for `verify` to find.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        there = self.storage.list(_SHARDS)
        rows = self.plan.shard_rows
        maybe_short = {count // rows for count in self.plan.earlier_counts if count % rows}
        sizes, missing = {}, []
        for k in range(self.plan.num_shards):
            size = there.pop(shard_name(k), 0)
            if size < _LEAST_PARQUET_BYTES or (k in maybe_short and not self._has_all_rows(k)):
                missing.append(k)
            else:
                sizes[k] = size
        return Listing(sizes, missing, list(there))

    def missing(self) -> list[int]:
        """Return the shards that are still to be written; see `listing`.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        return self.listing().missing

    def write_shard(
        self, k: int, index: npt.ArrayLike, label: npt.ArrayLike, tokens: npt.ArrayLike
    ) -> None:
        """Check the rows of shard `k` and commit them, replacing a shard that is there.

        Args:
            k: Which shard.
            index: Integers [N], exactly `plan.shard_range(k)`.
            label: Integers [N] in [0, num_classes), or N captions if the teacher takes text.
            tokens: Integers [N, L] in [0, vocab_size).

        Raises:
            ShardError: If the rows are not those of the plan.
            StorageError: If the shard cannot be written; none is left behind then.
        """
        rows = np.asarray(index), np.asarray(label), np.asarray(tokens)
        try:
            _check_rows(self.plan, k, *rows)
        except ShardError as exc:
            raise ShardError(f"shard {k} not written: {exc}") from exc
        self.storage.write(shard_name(k), _encode(self.plan, k, *rows))

    def read_shard(self, k: int) -> Rows:
        """Return the verified rows of shard `k`: index [N], label [N], tokens [N, L].

        Index is int64, label int32 (or an object array of captions), tokens uint16 or
        uint32.

        Raises:
            ShardError: If the shard is missing, damaged or of another plan.
            StorageError: If it cannot be read.
        """
        try:
            return self._load(k)
        except NotFoundError as exc:
            raise ShardError(
                f"{self.storage.join(shard_name(k))} is missing; rerun `ddray sample` to fill it"
            ) from exc
        except ShardError as exc:
            if not 0 <= k < self.plan.num_shards:
                raise
            raise ShardError(
                f"{self.storage.join(shard_name(k))}: {exc}; delete it and rerun `ddray sample`, "
                f"or run `ddray inspect {self.uri} --repair`"
            ) from exc

    def rows(self, start: int, stop: int) -> Rows:
        """Return the verified rows of indices [start, stop) from all shards they lie in.

        Raises:
            ShardError: If the range is not within the set, or a shard is missing or damaged.
            StorageError: If a shard cannot be read.
        """
        if not 0 <= start < stop <= self.plan.count:
            raise ShardError(
                f"rows [{start}, {stop}) are not within [0, {self.plan.count}) of {self.uri}"
            )
        parts = []
        for k in range(start // self.plan.shard_rows, (stop - 1) // self.plan.shard_rows + 1):
            first = self.plan.shard_range(k).start
            cut = slice(max(start - first, 0), stop - first)
            parts.append([column[cut] for column in self.read_shard(k)])
        index, label, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
        return index, label, tokens

    def verify(self, advance: Callable[[int], None] | None = None) -> VerifyReport:
        """Read every shard and report what is missing, damaged or does not belong.

        Args:
            advance: Told after each shard how many are done, missing ones included.

        Raises:
            StorageError: If the storage cannot be listed or read.
        """
        found = self.listing()
        missing, damaged, sound_rows = list(found.missing), {}, 0
        contents = read_ahead(self.storage, map(shard_name, found.sizes))
        for done, (k, data) in enumerate(zip(found.sizes, contents, strict=True), 1 + len(missing)):
            if data is None:
                # Deleted since the listing.
                missing.append(k)
            else:
                try:
                    sound_rows += len(_decode(self.plan, k, data)[0])
                except ShardError as exc:
                    damaged[k] = str(exc)
            if advance is not None:
                advance(done)
        return VerifyReport(
            self.plan.num_shards, sorted(missing), damaged, sound_rows, found.unexpected
        )

    def quarantine(self, name: str) -> str:
        """Move a file from shards/ to quarantine/ and return its new name.

        Of a shard, a gap is left, which a rerun fills.

        Args:
            name: `shard_name(k)`, or one of `VerifyReport.unexpected`.

        Raises:
            StorageError: If it is not there or cannot be moved.
        """
        content = self.storage.read(name)
        # An earlier quarantine's file of that name stays: it may hold somebody's only copy.
        for number in itertools.count():
            suffix = f"-{number}.bad" if number else ".bad"
            moved = f"quarantine/{name.removeprefix(_SHARDS)}{suffix}"
            # The copy comes first: a crash in between leaves two files, never none.
            if self.storage.write(moved, content, if_absent=True):
                break
        self.storage.delete(name)
        return moved

    def _load(self, k: int) -> Rows:
        self.plan.shard_range(k)
        return _decode(self.plan, k, self.storage.read(shard_name(k)))

    def _has_all_rows(self, k: int) -> bool:
        try:
            data = self.storage.read(shard_name(k))
            num_rows: int = pq.read_metadata(pa.BufferReader(data)).num_rows
        except (NotFoundError, *_UNREADABLE):
            return False
        return num_rows == len(self.plan.shard_range(k))


def shard_name(k: int) -> str:
    """Return the name of shard `k` below the set's URI."""
    return f"{_SHARDS}shard-{k:05d}.parquet"


# What pyarrow raises on a truncated or damaged file; MemoryError: a length that is garbage.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)


def _read_manifest(storage: Storage) -> Plan | None:
    try:
        return Plan.from_json(storage.read(_MANIFEST))
    except NotFoundError:
        return None
    except ShardError as exc:
        raise ShardError(f"{storage.join(_MANIFEST)}: {exc}") from exc


def _merged(existing: Plan, plan: Plan, uri: str) -> Plan:
    """Return `existing` with the count of `plan`, which must otherwise be the same."""
    if existing.hash != plan.hash:
        differences = [
            f"{item.name} is {getattr(existing, item.name)!r} there and "
            f"{getattr(plan, item.name)!r} here"
            for item in fields(Plan)
            if item.name not in NOT_HASHED
            and getattr(existing, item.name) != getattr(plan, item.name)
        ]
        raise ConfigError(
            f"{uri} holds a trajectory set of another plan: {'; '.join(differences)}. "
            "Choose another URI, or delete that set"
        )
    if plan.count < existing.count:
        raise ConfigError(
            f"count={plan.count} is below the {existing.count} rows of the set at {uri}; "
            f"give a count of at least {existing.count}, or choose another URI"
        )
    if plan.count == existing.count:
        return existing
    earlier = (*existing.earlier_counts, existing.count)
    return replace(existing, count=plan.count, earlier_counts=earlier)


def _check_rows(
    plan: Plan,
    k: int,
    index: npt.NDArray[Any],
    label: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
) -> None:
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


def _encode(
    plan: Plan,
    k: int,
    index: npt.NDArray[Any],
    label: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
) -> bytes:
    """Return the Parquet file of checked rows, the same bytes for the same rows."""
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


def _decode(plan: Plan, k: int, data: bytes) -> Rows:
    """Return the rows of a Parquet file after checking that they are those of shard `k`."""
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
    _check_rows(plan, k, *rows)
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

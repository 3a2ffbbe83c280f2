"""What a set of captions is conditioned on: one file of them for every shard.

The rows of shard k are conditioned on `captions/captions-0000k.parquet` in the set, which is cut
from the file that a run is given: a worker reads no more than its own part, and the set needs
nothing outside of itself.

Shapes: B batch, N rows of a shard, T caption positions (each row its own), D feature width.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ConfigError, ShardError, one_line
from ddray.file_kind import kind_of
from ddray.storage.base import NotFoundError, Storage
from ddray.storage.caption_file import CaptionFile
from ddray.storage.caption_parquet import matrices

_FOLDER = "captions/"
_HASH_KEY = b"ddray.captions_sha256"
# Texts stand beside features of a thousand times their size.
_TEXT_BUFFER_BYTES = 1 << 16
# What files of other columns than ours come to.
_FOREIGN = (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError)


@dataclass(frozen=True)
class ShardCaptions:
    """What the rows of one shard are conditioned on.

    Attributes:
        captions: texts, N of them.
        features: float32 [T, D] of each row; None where an encoder makes them.
        records: what a file of prompts says of each row, as JSON objects; None of other files.
    """

    captions: Sequence[str]
    features: Sequence[npt.NDArray[np.float32]] | None
    records: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> ShardCaptions:
        """The first rows."""
        return ShardCaptions(
            self.captions[:count],
            self.features and self.features[:count],
            self.records and self.records[:count],
        )

    @property
    def sha256(self) -> str:
        """Of the texts as a JSON list, each row's shape and little-endian features, the records."""
        digest = hashlib.sha256(json.dumps(list(self.captions)).encode())
        for features_TD in self.features or ():
            digest.update(json.dumps(features_TD.shape).encode())
            digest.update(np.ascontiguousarray(features_TD, dtype="<f4").tobytes())
        if self.records is not None:
            digest.update(json.dumps(list(self.records)).encode())
        return digest.hexdigest()


class CutRows(Protocol):
    """What of a plan decides how captions are cut."""

    @property
    def count(self) -> int:
        """Rows of all shards."""

    @property
    def num_shards(self) -> int:
        """How many there are."""

    def shard_range(self, k: int) -> range:
        """Indices of shard k."""


@dataclass(frozen=True)
class Cut:
    """`count` rows in shards of `shard_rows`, the last one shorter."""

    count: int
    shard_rows: int

    @property
    def num_shards(self) -> int:
        """Shards of all rows."""
        return -(-self.count // self.shard_rows)

    def shard_range(self, k: int) -> range:
        """Indices of shard k."""
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.count))


def captions_name(k: int) -> str:
    """Name of the captions of shard `k` below the set's URI."""
    return f"{_FOLDER}captions-{k:05d}.parquet"


def cut_captions(file: CaptionFile, storage: Storage, plan: CutRows) -> int:
    """Write the captions of every shard beside it, and say how many files were written.

    How many broken rows were left out, where they may be, is said on stderr.

    A file that is there with the same content is kept, or with more rows, which an extension
    left that did not come about. One that holds the first rows, as the last shard of a set that is
    extended does, is replaced.

    Raises:
        ConfigError: as `CaptionFile.rows`; and if a shard has other captions already.
        ShardError: if captions that are there are damaged.
        StorageError: if the file or the set cannot be read, or the set not written.
    """
    rows = file.rows(plan.count)
    there = storage.list(_FOLDER)
    written = 0
    for k in range(plan.num_shards):
        part = list(islice(rows, len(plan.shard_range(k))))
        features = [row.features_TD for row in part if row.features_TD is not None]
        # Of one encoding of images alone: elsewhere the same captions may come in another file.
        told = getattr(plan, "encoding", None) == "geneval"
        records = [row.record for row in part if told and row.record is not None]
        captions = ShardCaptions([row.caption for row in part], features or None, records or None)
        if captions_name(k) in there:
            existing = read_captions(storage, k)
            common = min(len(existing), len(captions))
            if existing.first(common).sha256 != captions.first(common).sha256:
                raise ConfigError(
                    f"captions of shard {k} differ from those that the set was made with; give the "
                    f"file that {storage.uri} was made with, or choose another URI"
                )
            if len(existing) >= len(captions):
                continue
        storage.write(captions_name(k), caption_parquet(part[0].index, captions))
        written += 1
    if file.left_out.count:
        print(f"captions {file.uri}: {file.left_out}", file=sys.stderr, flush=True)
    return written


def left_out(file: CaptionFile | None) -> dict[str, int]:
    """What a summary says of broken rows of captions, once they are cut; nothing of classes."""
    return {} if file is None else {"captions_left_out": file.left_out.count}


def read_captions(storage: Storage, k: int, count: int | None = None) -> ShardCaptions:
    """Return the verified captions of shard `k`.

    Args:
        storage: of the set.
        k: which shard.
        count: how many of its rows, from the first; None = as many as there are.

    Raises:
        ShardError: if the file is missing, damaged, or has too few rows.
        StorageError: if it cannot be read.
    """
    where = storage.join(captions_name(k))
    advice = "run `ddray sample` or `generate` again with the captions that the set was made with"
    try:
        data = storage.read(captions_name(k))
    except NotFoundError as exc:
        raise ShardError(f"{where} is missing; {advice}") from exc
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()
        captions = table["caption"].to_pylist()
        features = None
        if "features" in table.column_names:
            features = [matrix for part in table["features"].chunks for matrix in matrices(part)]
        records = table["record"].to_pylist() if "record" in table.column_names else None
        written = ShardCaptions(captions, features, records)
        if written.sha256.encode() != (table.schema.metadata or {}).get(_HASH_KEY):
            raise ValueError("the rows do not fit their sha256")
    except (pa.ArrowException, *_FOREIGN) as exc:
        kind = kind_of(data)
        told = kind.name if kind and "Parquet" not in kind.name else one_line(exc)
        raise ShardError(f"{where} is damaged ({told}); delete it and {advice}") from exc
    if count is not None and len(written) < count:
        raise ShardError(f"{where} has {len(written)} of {count} rows; {advice}")
    return written.first(len(written) if count is None else count)


def read_texts(storage: Storage, k: int, count: int | None = None) -> ShardCaptions:
    """As `read_captions`, of a shard's texts and records alone: its features are not fetched.

    What is read is held to the checksums of its pages.
    """
    name = captions_name(k)
    stamp = storage.stamp(name)
    if stamp is not None:
        try:
            with storage.open_file(name, stamp.size, _TEXT_BUFFER_BYTES) as file:
                columns = pq.ParquetFile(file, page_checksum_verification=True)
                table = columns.read(["caption", "record"], use_threads=False)
            records = table["record"].to_pylist() if "record" in table.column_names else None
            texts = ShardCaptions(table["caption"].to_pylist(), None, records)
            if count is None or len(texts) >= count:
                return texts.first(len(texts) if count is None else count)
        except (pa.ArrowException, *_FOREIGN):
            pass
    # Which says what is wrong.
    return replace(read_captions(storage, k, count), features=None)


def padded(
    features: Sequence[npt.NDArray[np.float32]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Features of a batch of rows as a text encoder gives them.

    Args:
        features: B arrays, float32 [T, D].

    Returns:
        Features float32 [B, T, D] with the longest row's T, zero on the right, and mask bool
        [B, T], True = valid.
    """
    lengths = np.array([len(features_TD) for features_TD in features])
    mask_BT = np.arange(lengths.max())[None] < lengths[:, None]
    features_BTD = np.zeros((*mask_BT.shape, features[0].shape[1]), dtype=np.float32)
    features_BTD[mask_BT] = np.concatenate(features)
    return features_BTD, mask_BT


def caption_parquet(first: int, captions: ShardCaptions) -> bytes:
    """The Parquet file of some captions, features in the dtype that they have.

    Args:
        first: index of the first of them.
        captions: the rows.
    """
    columns = {
        "index": pa.array(np.arange(first, first + len(captions), dtype=np.int64)),
        "caption": pa.array(captions.captions, pa.string()),
    }
    if captions.records is not None:
        columns["record"] = pa.array(captions.records, pa.string())
    if captions.features is not None:
        values = np.concatenate(captions.features)
        lengths = [len(features_TD) for features_TD in captions.features]
        inner = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
        outer = np.cumsum([0, *lengths], dtype=np.int64)
        positions = pa.LargeListArray.from_arrays(inner, values.reshape(-1))
        columns["features"] = pa.LargeListArray.from_arrays(outer, positions)
    table = pa.table(columns).replace_schema_metadata({_HASH_KEY: captions.sha256})
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=["caption", *["record"] * (captions.records is not None)],
        # Of bfloat16 features half of the bytes are zero; apart from the others they cost nothing.
        use_byte_stream_split=["features.list.element.list.element"],
        write_page_checksum=True,
    )
    return sink.getvalue()

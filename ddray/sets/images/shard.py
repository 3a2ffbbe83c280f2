"""One shard of an image set as bytes and back, checked: Parquet, WebDataset tar, list of files.

Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from ddray.errors import ShardError, one_line
from ddray.file_kind import json_value
from ddray.sets.images.features import hugging_face_metadata
from ddray.sets.images.plan import ImagePlan
from ddray.sets.parquet import (
    damaged,
    label_bytes,
    label_field,
    num_rows,
    read_table,
    tokens_column,
    tokens_matrix,
    tokens_type,
    write_table,
)
from ddray.sets.sharded_set import check_stamp, stamp
from ddray.storage.base import Storage, read_ahead

_FOLDER = "images/"
# What files of other columns, members or types than ours come to.
_FOREIGN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class ImageRows:
    """Rows of a shard.

    Attributes:
        index: int64 [N].
        label: classes int32 [N], or N captions.
        content: N image files, or tokens [N, L].
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[Any]
    content: Sequence[bytes] | npt.NDArray[Any]

    def sha256(self, plan: ImagePlan) -> str:
        """Of index and labels as in trajectory shards, then of each file's length and bytes.

        Lengths are little-endian int64. Tokens are hashed as in trajectory shards.
        """
        digest = hashlib.sha256(self.index.astype("<i8").tobytes())
        digest.update(label_bytes(plan, self.label))
        if isinstance(self.content, np.ndarray):
            digest.update(self.content.astype(plan.token_dtype).tobytes())
        else:
            for file in self.content:
                digest.update(len(file).to_bytes(8, "little"))
                digest.update(file)
        return digest.hexdigest()


class ShardFormat(ABC):
    """How a shard is written.

    Args:
        plan: of the set.
        storage: of the set.
    """

    SUFFIX: ClassVar[str]

    def __init__(self, plan: ImagePlan, storage: Storage):
        self._plan, self._storage = plan, storage
        is_class = plan.conditioning == "class"
        self._label_name = "label" if is_class else "caption"
        self._label_type: Callable[[Any], int | str] = int if is_class else str

    @abstractmethod
    def encode(self, k: int, rows: ImageRows) -> bytes:
        """The bytes of a shard, a function of plan and rows."""

    @abstractmethod
    def num_rows(self, data: bytes) -> int | None:
        """How many rows a shard says it has; None if it cannot be read."""

    @abstractmethod
    def _read(self, k: int, data: bytes) -> tuple[ImageRows, str]:
        """The rows of a shard that says it is shard `k`, and the hash they must have."""

    def decode(self, k: int, data: bytes) -> ImageRows:
        """The rows of a shard, after checking that they are those of shard `k`.

        Raises:
            ShardError: if they are not, or the shard is damaged.
        """
        try:
            rows, expected = self._read(k, data)
            fits = rows.sha256(self._plan) == expected
        except _FOREIGN as exc:
            raise ShardError(damaged(data, one_line(exc), self.SUFFIX)) from exc
        if not fits:
            raise ShardError("the rows do not fit their sha256")
        index = np.asarray(self._plan.shard_range(k))
        if not np.array_equal(rows.index, index):
            raise ShardError(f"index is not {index[0]} to {index[-1]} in order")
        if self._plan.conditioning == "class" and not np.array_equal(
            rows.label, self._plan.label(index)
        ):
            raise ShardError("the labels are not those of the plan")
        return rows

    def _stamp(self, k: int, rows: ImageRows) -> dict[str, str]:
        return {**stamp(self._plan, k, rows.sha256(self._plan)), "ddray.seed": str(self._plan.seed)}

    def _labels(self, labels: Sequence[Any]) -> npt.NDArray[Any]:
        is_class = self._plan.conditioning == "class"
        return np.array([*map(self._label_type, labels)], np.int32 if is_class else object)


class ParquetShards(ShardFormat):
    """Columns index, label or caption, seed, and image or tokens.

    Since format 2 as Hugging Face's `datasets` writes them: an image is a struct of its bytes and
    the name it would have as a file, a label an int64, and metadata say which column is which.
    """

    SUFFIX = "parquet"

    def encode(self, k: int, rows: ImageRows) -> bytes:
        """See `ShardFormat`."""
        schema, is_tokens = self._schema(), isinstance(rows.content, np.ndarray)
        columns = [
            pa.array(rows.index, type=schema.field(0).type),
            pa.array(rows.label.tolist(), type=schema.field(1).type),
            pa.array(np.full(len(rows.index), self._plan.seed)),
            tokens_column(self._plan, np.asarray(rows.content))
            if is_tokens
            else self._image_column(rows),
        ]
        metadata = self._stamp(k, rows)
        if self._plan.format > 1:
            metadata |= hugging_face_metadata(self._plan)
        table = pa.Table.from_arrays(columns, schema=schema.with_metadata(metadata))
        packed = ["index", "seed"] + ["label"] * (self._plan.conditioning == "class")
        if not is_tokens:
            # Image files are compressed already.
            return write_table(table, packed=packed, compression="none")
        return write_table(table, packed=[*packed, "tokens.list.element"], compression="zstd")

    def num_rows(self, data: bytes) -> int | None:
        """See `ShardFormat`."""
        return num_rows(data)

    def _read(self, k: int, data: bytes) -> tuple[ImageRows, str]:
        table, expected = read_table(self._plan, k, data, self._schema())
        index, label, _, content = (column.combine_chunks() for column in table.columns)
        rows = ImageRows(
            index.to_numpy(zero_copy_only=False),
            self._labels(label.to_pylist()),
            tokens_matrix(self._plan, content)
            if self._plan.content == "tokens"
            else self._files(content),
        )
        return rows, expected

    def _schema(self) -> Any:
        plan, label = self._plan, label_field(self._plan)
        if plan.format > 1 and plan.conditioning == "class":
            label = ("label", pa.int64())
        content = ("image", pa.binary() if plan.format == 1 else _IMAGE)
        if plan.content == "tokens":
            content = ("tokens", tokens_type(plan))
        return pa.schema([("index", pa.int64()), label, ("seed", pa.int64()), content])

    def _image_column(self, rows: ImageRows) -> Any:
        files = pa.array(rows.content, type=pa.binary())
        if self._plan.format == 1:
            return files
        names = [f"{i:09d}.{self._plan.image_format}" for i in rows.index.tolist()]
        return pa.StructArray.from_arrays([files, pa.array(names)], fields=[*_IMAGE])

    def _files(self, column: Any) -> list[bytes]:
        files: list[bytes] = (column if self._plan.format == 1 else column.field(0)).to_pylist()
        return files


class TarShards(ShardFormat):
    """WebDataset: an image and its class (.cls) or caption (.txt), one after the other.

    No dates and no owners: a rerun gives the same bytes. The stamp is in the archive's global
    header.
    """

    SUFFIX = "tar"

    def encode(self, k: int, rows: ImageRows) -> bytes:
        """See `ShardFormat`."""
        stream = io.BytesIO()
        label_suffix = "cls" if self._plan.conditioning == "class" else "txt"
        with tarfile.open(
            fileobj=stream,
            mode="w",
            format=tarfile.PAX_FORMAT,
            pax_headers=self._stamp(k, rows),
        ) as archive:
            for i, label, file in zip(rows.index, rows.label, rows.content, strict=True):
                for suffix, data in (
                    (self._plan.image_format, file),
                    (label_suffix, str(label).encode()),
                ):
                    entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        return stream.getvalue()

    def num_rows(self, data: bytes) -> int | None:
        """See `ShardFormat`."""
        try:
            return len(self._files(data)[1]) // 2
        except ShardError:
            return None

    def _read(self, k: int, data: bytes) -> tuple[ImageRows, str]:
        metadata, files = self._files(data)
        expected = check_stamp(self._plan, k, metadata, len(files) // 2)
        try:
            rows = ImageRows(
                np.array([int(name.partition(".")[0]) for name, _ in files[::2]]),
                self._labels([text.decode() for _, text in files[1::2]]),
                [image for _, image in files[::2]],
            )
        except ValueError as exc:
            raise ShardError(f"damaged or truncated ({one_line(exc)})") from exc
        return rows, expected

    def _files(self, data: bytes) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
        """Global header, and (name, content) of the members in their order."""
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                files = [(member.name, _content(archive, member)) for member in archive]
                return dict(archive.pax_headers), files
        except (tarfile.TarError, OSError, EOFError, MemoryError, *_FOREIGN) as exc:
            raise ShardError(damaged(data, one_line(exc), self.SUFFIX)) from exc


class ListShards(ShardFormat):
    """Image files in folders; the list of a shard's files makes it whole."""

    SUFFIX = "json"

    def encode(self, k: int, rows: ImageRows) -> bytes:
        """See `ShardFormat`; writes the images, so that the list can be written last."""
        images = []
        for i, label, file in zip(rows.index, rows.label.tolist(), rows.content, strict=True):
            name = image_name(self._plan, int(i), label)
            self._storage.write(name, file)
            images.append({"index": int(i), self._label_name: label, "file": name})
        stamped = {**self._stamp(k, rows), "images": images}
        return (json.dumps(stamped, indent=0) + "\n").encode()

    def num_rows(self, data: bytes) -> int | None:
        """See `ShardFormat`."""
        try:
            return len(_listed(data)["images"])
        except ShardError:
            return None

    def _read(self, k: int, data: bytes) -> tuple[ImageRows, str]:
        listed = _listed(data)
        stamped = {name: str(value) for name, value in listed.items() if name != "images"}
        expected = check_stamp(self._plan, k, stamped, len(listed["images"]))
        try:
            files = [
                (int(image["index"]), self._label_type(image[self._label_name]), str(image["file"]))
                for image in listed["images"]
            ]
        except (KeyError, TypeError, ValueError) as exc:
            raise ShardError(f"damaged or truncated ({one_line(exc)})") from exc
        for i, label, name in files:
            if name != image_name(self._plan, i, label):
                raise ShardError(f"{name} is no image of the plan")
        contents: list[bytes] = []
        for (_, _, name), content in zip(
            files, read_ahead(self._storage, [name for _, _, name in files]), strict=True
        ):
            if content is None:
                raise ShardError(f"{name} is missing")
            contents.append(content)
        rows = ImageRows(
            np.array([i for i, _, _ in files]), self._labels([la for _, la, _ in files]), contents
        )
        return rows, expected


FORMATS: dict[str, type[ShardFormat]] = {
    "parquet": ParquetShards,
    "webdataset": TarShards,
    "images": ListShards,
    "flat": ListShards,
    "npz": ParquetShards,
    "coco": ListShards,
    "geneval": ListShards,
}


def image_name(plan: ImagePlan, index: int, label: Any) -> str:
    """Name of an image file: in a folder for its class, or for captions of its shard's number.

    Of encodings flat and coco all lie in one folder, of geneval in one for each prompt.
    """
    if plan.encoding == "geneval":
        prompt, sample = divmod(index, plan.samples_per_prompt)
        return f"{_FOLDER}{prompt:05d}/samples/{sample:04d}.{plan.image_format}"
    if plan.encoding in ("flat", "coco"):
        return f"{_FOLDER}{index:06d}.{plan.image_format}"
    if plan.conditioning == "class":
        folder = f"{label:0{len(str(plan.num_classes - 1))}d}"
    else:
        folder = f"{index // plan.shard_rows:05d}"
    return f"{_FOLDER}{folder}/{index:09d}.{plan.image_format}"


def metadata_name(prompt: int) -> str:
    """Name of the file that tells GenEval of a prompt, beside its images."""
    return f"{_FOLDER}{prompt:05d}/metadata.jsonl"


def stray_images(plan: ImagePlan, storage: Storage) -> list[str]:
    """Names below images/ that the plan does not have.

    Raises:
        StorageError: if the storage cannot be listed.
    """
    index = np.arange(plan.count)
    label = plan.label(index) if plan.conditioning == "class" else index
    names = {image_name(plan, i, la) for i, la in zip(index.tolist(), label.tolist(), strict=True)}
    if plan.encoding == "geneval":
        names |= {metadata_name(i) for i in range(plan.count // plan.samples_per_prompt)}
    return [name for name in storage.list(_FOLDER) if name not in names]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise EOFError(f"{member.name} ends too early")
    return data


def _listed(data: bytes) -> dict[str, Any]:
    try:
        listed = json_value(data)
    except ValueError as exc:
        raise ShardError(damaged(data, one_line(exc), "JSON")) from exc
    if not isinstance(listed, dict) or not isinstance(listed.get("images"), list):
        raise ShardError("not a shard that ddray wrote: it lists no images")
    return listed

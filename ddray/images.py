"""Image sets: generated images of consecutive indices, in shards.

A shard is a Parquet file, a WebDataset tar, or a folder of PNG files. Like a trajectory set, an
image set has a plan that decides its bytes, and a shard exists whole or not at all. Imports
ddray.errors, report (pixels) and storage.

Shapes: N images, H and W pixels.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ddray.errors import ConfigError, ShardError
from ddray.report import to_uint8
from ddray.storage import Storage, open_storage

FORMAT = 1
_MANIFEST = "manifest.json"
_SUFFIXES = {"parquet": "parquet", "webdataset": "tar", "images": "json"}


@dataclass(frozen=True)
class ImagePlan:
    """Everything that decides an image set's bytes, and its size.

    Attributes:
        student: name or folder.
        student_fingerprint: sha256 of the network's weights.
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        num_classes: index i is of class i % num_classes.
        seed: of the noise.
        schedule: as given to `Student.generate`.
        encoding: of the shards.
        count: images in all.
        shard_rows: images of a shard.
        batch_size: images generated together.
        threads: CPU threads of a worker.
    """

    student: str
    student_fingerprint: str
    tokenizer_fingerprint: str
    num_classes: int
    seed: int
    schedule: str
    encoding: Literal["parquet", "webdataset", "images"]
    count: int
    shard_rows: int
    batch_size: int
    threads: int

    @property
    def hash(self) -> str:
        """sha256 of everything but the name and the count."""
        values = {k: v for k, v in asdict(self).items() if k not in ("student", "count")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_rows)

    def shard_range(self, k: int) -> range:
        """Indices of shard k."""
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.count))

    def label(self, index: np.ndarray) -> np.ndarray:
        """Classes in turn, int32."""
        return (index % self.num_classes).astype(np.int32)

    def shard_name(self, k: int) -> str:
        """Name of shard k; of encoding "images" it is the list of the shard's files."""
        rows = self.shard_range(k)
        # The range stands in the name: a short last shard of a smaller set is another file.
        return f"shards/images-{rows.start:09d}-{rows.stop:09d}.{_SUFFIXES[self.encoding]}"


class ImageSet:
    """An image set under a URI; made by `create` or `open`.

    Attributes:
        plan: what it holds.
        storage: where it lies.
    """

    def __init__(self, storage: Storage, plan: ImagePlan):
        self.storage, self.plan = storage, plan

    @classmethod
    def create(cls, uri: str, plan: ImagePlan) -> "ImageSet":
        """Begin a set, or take up the one of the same plan that is there.

        Raises:
            ConfigError: if another plan's set is there, or a larger one.
            StorageError: if the URI cannot be written.
        """
        storage = open_storage(uri)
        storage.check_writable()
        if storage.exists(_MANIFEST):
            earlier = cls.open(uri).plan
            here, there = asdict(plan), asdict(earlier)
            differ = [
                f"{name}: {there[name]!r} there, {here[name]!r} now"
                for name in here
                if here[name] != there[name] and name not in ("student", "count")
            ]
            if plan.count < earlier.count:
                differ.append(f"count: {earlier.count} there, {plan.count} now")
            if differ:
                raise ConfigError(
                    f"{uri} holds an image set of another plan ({'; '.join(differ)}); choose "
                    "another out, or delete it"
                )
            stale = earlier.shard_name(earlier.num_shards - 1)
            if stale != plan.shard_name(earlier.num_shards - 1):
                # A short last shard: whoever reads all of shards/ would count its rows twice.
                storage.delete(stale)
        text = json.dumps({"format": FORMAT, "plan_hash": plan.hash, **asdict(plan)}, indent=2)
        storage.write(_MANIFEST, (text + "\n").encode())
        return cls(storage, plan)

    @classmethod
    def open(cls, uri: str) -> "ImageSet":
        """Open a set, complete or not.

        Raises:
            ShardError: if there is none or it is foreign.
        """
        storage = open_storage(uri)
        if not storage.exists(_MANIFEST):
            raise ShardError(f"no image set at {uri}: it has no {_MANIFEST}")
        try:
            values: dict[str, Any] = json.loads(storage.read(_MANIFEST))
            if values.get("format") != FORMAT:
                raise ShardError(f"{uri} is of format {values.get('format')!r}, not {FORMAT}")
            plan = ImagePlan(**{field.name: values[field.name] for field in fields(ImagePlan)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{storage.join(_MANIFEST)} is no image set's manifest") from error
        return cls(storage, plan)

    def missing(self) -> list[int]:
        """Shards that are still to be written, by listing the storage."""
        there = self.storage.list("shards")
        return [k for k in range(self.plan.num_shards) if self.plan.shard_name(k) not in there]

    def write_shard(self, k: int, images: np.ndarray) -> None:
        """Commit a shard.

        Args:
            k: which.
            images: float [N, C, H, W] in [0, 1], in order of the shard's indices.

        Raises:
            ShardError: for another number of images.
            StorageError: if it cannot be written.
        """
        index = np.asarray(self.plan.shard_range(k))
        if len(images) != len(index):
            raise ShardError(f"shard {k} takes {len(index)} images, got {len(images)}")
        labels = self.plan.label(index)
        pngs = [encode_png(pixels) for pixels in to_uint8(images)]
        if self.plan.encoding == "parquet":
            data = _parquet(index, labels, pngs, self.plan)
        elif self.plan.encoding == "webdataset":
            data = _tar(index, labels, pngs)
        else:
            data = self._write_files(index, labels, pngs)
        self.storage.write(self.plan.shard_name(k), data)

    def _write_files(self, index: np.ndarray, labels: np.ndarray, pngs: list[bytes]) -> bytes:
        """One PNG an image; the list of their names is committed last and makes the shard whole."""
        names = [f"images/{i:09d}-{label}.png" for i, label in zip(index, labels, strict=True)]
        for name, png in zip(names, pngs, strict=True):
            self.storage.write(name, png)
        return (json.dumps(names, indent=0) + "\n").encode()


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 pixels [H, W] or [H, W, 3]; a function of the pixels alone."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _parquet(index: np.ndarray, labels: np.ndarray, pngs: list[bytes], plan: ImagePlan) -> bytes:
    table = pa.table(
        {"index": pa.array(index), "label": pa.array(labels), "png": pa.array(pngs, pa.binary())}
    ).replace_schema_metadata({"ddray.plan_hash": plan.hash, "ddray.seed": str(plan.seed)})
    stream = io.BytesIO()
    # PNG is compressed already, and a dictionary of distinct images would only double the work.
    pq.write_table(table, stream, compression="none", use_dictionary=False)
    return stream.getvalue()


def _tar(index: np.ndarray, labels: np.ndarray, pngs: list[bytes]) -> bytes:
    """WebDataset: per image NAME.png and NAME.cls, no dates: a rerun gives the same bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for i, label, png in zip(index, labels, pngs, strict=True):
            for suffix, data in (("png", png), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()

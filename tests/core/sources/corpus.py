"""The same few images as every kind of source, and files that no source should take silently."""

import dataclasses
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ddray.report.image_file import encode_png
from ddray.sets.images.image_set import ImageSet
from ddray.storage import open_storage
from tests.core.sets.images.test_image_set import PLAN

COUNT = 13
PIXELS = np.random.default_rng(5).integers(0, 256, (COUNT, 6, 5, 3)).astype(np.uint8)
FILES = [encode_png(image) for image in PIXELS]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep_png(values: npt.NDArray[np.uint16], colour_type: int) -> bytes:
    """A PNG of 16 bits a channel [H, W, C]: which Pillow cannot write in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def tar_of(members: Sequence[tuple[str, bytes]], **options: Any) -> bytes:
    """A tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def parquet_of(columns: dict[str, Any], rows_of_group: int = 4) -> bytes:
    """A Parquet file."""
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=rows_of_group)
    return stream.getvalue()


def struct_column(files: Sequence[bytes | None]) -> Any:
    """Images as Hugging Face writes them."""
    rows = [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def npz_of(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    """An .npz."""
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def write(uri: str, files: dict[str, bytes]) -> str:
    """Files at a place, which it returns."""
    storage = open_storage(uri)
    for name, data in files.items():
        if uri.startswith("s3://"):
            storage.write(name, data)
        else:  # which need not be durable
            path = Path(uri, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return uri


def _flat(uri: str) -> str:
    files = {f"{i:03d}.png": file for i, file in enumerate(FILES)}
    # Written in no order, beside what is none of it.
    shuffled = dict(sorted(files.items(), key=lambda item: item[0][::-1]))
    return write(uri, shuffled | {"README.md": b"x", ".hidden.png": b"x"})


def _by_class(uri: str) -> str:
    return write(uri, {f"n{i // 5:02d}/{i % 5}.PNG": file for i, file in enumerate(FILES)})


def _pattern(uri: str) -> str:
    write(uri, {f"{i // 5}/{i:03d}.png": file for i, file in enumerate(FILES)})
    write(uri, {"other/0.jpg": b"x", "0/tars.tar": b"x"})
    return f"{uri}/[0-9]/*.png"


def _webdataset(uri: str) -> str:
    parts: list[list[tuple[str, bytes]]] = [[], [], []]
    for i, file in enumerate(FILES):
        sample = [(f"{i:05d}.cls", b"3"), (f"{i:05d}.png", file), (f"{i:05d}.json", b"{}")]
        parts[i // 5] += sample
    parts[1].insert(0, ("./._00005.png", b"AppleDouble"))
    parts[2][-2] = ("a/" * 60 + "00012.png", FILES[12])
    return write(uri, {f"set-{k:03d}.tar": tar_of(part) for k, part in enumerate(parts)})


def _hugging_face(uri: str) -> str:
    parts = FILES[:7], FILES[7:8], FILES[8:]
    return write(
        uri,
        {
            f"data/train-{k:05d}-of-00003.parquet": parquet_of(
                {"image": struct_column(part), "label": [1] * len(part), "other": part}
            )
            for k, part in enumerate(parts)
        },
    )


def _binary(uri: str) -> str:
    write(uri, {"one.parquet": parquet_of({"number": range(COUNT), "jpeg": FILES})})
    return f"{uri}/one.parquet"


def _npz(uri: str) -> str:
    return write(uri, {"some.npz": npz_of(labels=np.arange(3), arr_0=PIXELS)}) + "/some.npz"


def _packed_npz(uri: str) -> str:
    return write(uri, {"some.npz": npz_of(np.savez_compressed, arr_0=PIXELS)})


def _ours(encoding: str) -> Callable[[str], str]:
    def make(uri: str) -> str:
        plan = dataclasses.replace(PLAN, encoding=encoding, count=COUNT, shard_rows=5)
        images = ImageSet.create(uri, plan)
        for k in range(plan.num_shards):
            rows = plan.shard_range(k)
            images.write_shard(k, plan.label(np.asarray(rows)), FILES[rows.start : rows.stop])
        return uri

    return make


SOURCES = {
    "flat": _flat,
    "by class": _by_class,
    "pattern": _pattern,
    "webdataset": _webdataset,
    "Hugging Face": _hugging_face,
    "binary": _binary,
    "npz": _npz,
    "packed npz": _packed_npz,
    **{f"ours {name}": _ours(name) for name in ("parquet", "webdataset", "images", "flat", "npz")},
}

"""`samples.npz`: the pixels of a whole set in one array, as evaluators of generated images read it.

`arr_0` is uint8 [N, H, W, 3] in the order of the indices, grey as three equal channels. It is
written image by image, so memory does not grow with N.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.progress import Progress
from ddray.report.image_file import decode_image
from ddray.sets.images.image_set import SAMPLES, ImageSet


def write_samples(images: ImageSet) -> None:
    """Write the array of a set that is whole; progress goes to stderr.

    Raises:
        ShardError: if a shard is missing or damaged; nothing is written then.
        StorageError: if it cannot be read or written.
    """
    pixels = _pixels(images)
    first = next(pixels)
    shape = (images.plan.count, *first.shape)
    images.storage.write_stream(SAMPLES, npz_chunks(shape, chain((first,), pixels)))


def npz_chunks(shape: tuple[int, ...], parts: Iterable[npt.NDArray[np.uint8]]) -> Iterator[bytes]:
    """An uncompressed `.npz` file with one array `arr_0`, the same bytes for the same pixels.

    Args:
        shape: of the array.
        parts: uint8, its pixels in C order.

    Yields:
        Parts of the file.
    """
    sink = _Sink()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    # An entry without a date, which may pass 4 GB.
    entry = zipfile.ZipInfo("arr_0.npy")
    with zipfile.ZipFile(sink, "w") as archive:
        with archive.open(entry, "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(part.tobytes())
                yield sink.take()
        yield sink.take()
    yield sink.take()


def _pixels(images: ImageSet) -> Iterator[npt.NDArray[np.uint8]]:
    """Pixels [H, W, 3] of each image."""
    with Progress(SAMPLES, images.plan.count, "images") as bar:
        bar.begin()
        for k in range(images.plan.num_shards):
            for file in images.read_shard(k).content:
                pixels = decode_image(file)
                yield pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1)
                bar.advance_to(bar.done + 1)


class _Sink(io.RawIOBase):
    """Keeps what is written to it until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any, /) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken

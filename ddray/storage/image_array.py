"""`arr_0` of an .npz, the array of images by which tools of the field hand over samples."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

IMAGES = "arr_0"


def image_shape(array: IO[bytes]) -> tuple[int, int, int, int]:
    """Shape [M, H, W, 3] by the header of an array, which is left at its first pixel.

    Args:
        array: the content of `arr_0.npy` from its beginning.

    Raises:
        ValueError: if it is no uint8 [M, H, W, 3] in C order.
    """
    version = np.lib.format.read_magic(array)
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(array)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or (fortran and shape[0]):
        raise ValueError(f"{IMAGES} is {dtype} {[*shape]}, not uint8 [M, H, W, 3] in C order")
    count, height, width, channels = shape
    return count, height, width, channels


def npz_chunks(
    shape: tuple[int, ...],
    parts: Iterable[npt.NDArray[np.uint8]],
    others: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Iterator[bytes]:
    """An uncompressed `.npz` file with `arr_0`, the same bytes for the same arrays.

    Args:
        shape: of `arr_0`; the array is left out if it holds no images.
        parts: uint8, its pixels in C order, which are never held all at once.
        others: arrays that stand before it, by name.

    Yields:
        Parts of the file.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in (others or {}).items():
            with archive.open(_entry(name), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
            yield sink.take()
        if shape[0]:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with archive.open(_entry(IMAGES), "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(part.tobytes())
                    yield sink.take()
        yield sink.take()
    yield sink.take()


def _entry(name: str) -> zipfile.ZipInfo:
    """Without a date; it may pass 4 GB."""
    return zipfile.ZipInfo(f"{name}.npy")


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

"""The header of `arr_0`, the array of images by which tools of the field hand over samples."""

from typing import IO

import numpy as np

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

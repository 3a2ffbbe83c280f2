"""Image files of the service."""

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

ImageFormat = Literal["png", "webp", "jpeg"]
MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
}
QUALITY = 90
"""Of WebP and JPEG where nobody asks for another."""


def image_bytes(
    pixels: npt.NDArray[np.uint8], output_format: ImageFormat = "png", quality: int = QUALITY
) -> bytes:
    """An image file, the same bytes for the same pixels.

    Args:
        pixels: uint8 [H, W] or [H, W, 3].
        output_format: PNG is exact.
        quality: of WebP and JPEG, 0 to 100.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        # Level 1 instead of 6: files hardly grow, and the time until the image is there counts.
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, output_format.upper(), quality=quality)
    return buffer.getvalue()

"""Image files of pixels: PNG, and WebP with or without loss."""

import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def encode_png(pixels: npt.NDArray[np.uint8], *, fast: bool = False) -> bytes:
    """PNG bytes of uint8 pixels [H, W] or [H, W, 3]; a function of the arguments alone.

    Args:
        pixels: of the image.
        fast: look for runs alone, which are what is left of a photograph behind PNG's filters.
    """
    stream = io.BytesIO()
    options = {"compress_type": zlib.Z_RLE} if fast else {}
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def encode_webp(
    pixels: npt.NDArray[np.uint8], quality: int | None = None, *, fast: bool = False
) -> bytes:
    """WebP bytes of uint8 pixels [H, W] or [H, W, 3]; a function of the arguments alone.

    Args:
        pixels: grey ones become three equal channels, as WebP knows no others.
        quality: 1 to 100; None = without loss.
        fast: look for the first coding that fits.
    """
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    if fast:
        options["method"] = 0
    Image.fromarray(pixels).save(stream, "WEBP", **options)
    return stream.getvalue()


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [H, W] or [H, W, 3] of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)))

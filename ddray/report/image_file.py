"""Image files of pixels: PNG, and WebP with or without loss."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """PNG bytes of uint8 pixels [H, W] or [H, W, 3]; a function of the pixels alone."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def encode_webp(pixels: npt.NDArray[np.uint8], quality: int | None = None) -> bytes:
    """WebP bytes of uint8 pixels [H, W] or [H, W, 3]; a function of the pixels alone.

    Args:
        pixels: grey ones become three equal channels, as WebP knows no others.
        quality: 1 to 100; None = without loss.
    """
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    if quality is None:
        image.save(stream, "WEBP", lossless=True)
    else:
        image.save(stream, "WEBP", quality=quality)
    return stream.getvalue()


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [H, W] or [H, W, 3] of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)))

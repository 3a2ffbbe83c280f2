"""The bytes of the service's images."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddray.serving.image_file import MEDIA_TYPES, ImageFormat, image_bytes


def _gradient(channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    levels = np.arange(32 * 48 * channels) // (6 * channels) % 256
    return levels.astype(np.uint8).reshape((32, 48, channels) if channels > 1 else (32, 48))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_exactly(channels: int) -> None:
    pixels = _gradient(channels)
    picture = Image.open(io.BytesIO(image_bytes(pixels)))
    assert (picture.format, picture.mode) == ("PNG", "L" if channels == 1 else "RGB")
    assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_webp_and_jpeg_are_near_the_pixels(output_format: ImageFormat, channels: int) -> None:
    pixels = _gradient(channels)
    picture = Image.open(io.BytesIO(image_bytes(pixels, output_format)))
    assert (picture.format, picture.size) == (output_format.upper(), (48, 32))
    seen = np.asarray(picture.convert("L" if channels == 1 else "RGB"), dtype=int)
    assert np.abs(seen - pixels).mean() < 4


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_the_same_pixels_give_the_same_file(output_format: ImageFormat) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert image_bytes(pixels, output_format) == image_bytes(pixels.copy(), output_format)
    # Rows of a batch are views of it.
    batch = np.stack([pixels, pixels])[:, :, ::-1][:, :, ::-1]
    assert image_bytes(batch[1], output_format) == image_bytes(pixels, output_format)


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_a_lower_quality_makes_smaller_files(output_format: ImageFormat) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = [len(image_bytes(pixels, output_format, quality)) for quality in (0, 40, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert image_bytes(pixels, output_format) == image_bytes(pixels, output_format, 90)

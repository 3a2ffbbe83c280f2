"""What becomes of an image's colours and size: the one place that decides it.

Taken as they are: 8-bit colours; grey, as three equal channels; palettes and alpha channels in
which nothing is transparent. All else means different things to different tools, and is refused
unless the caller says "convert". An EXIF orientation is not applied, as no tool that computes FID
does.

Shapes: H and W pixels, S pixels a side of a crop.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ddray.errors import one_line
from ddray.file_kind import kind_of

# Formats by what a file holds, whatever its name ends in.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# 8 bits a channel, or less of grey and of palettes.
_COLOURS, _GREYS = ("RGB", "RGBA", "RGBX", "P", "PA"), ("1", "L", "LA")
_DEEP_GREYS = ("I;16", "I;16B", "I;16L", "I")
_OTHER_ORDER = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
# As Pillow's own guard against files that become gigabytes.
_MOST_PIXELS = 2**30 // 12
_CONVERT = "; --convert takes it as Pillow does"


class PixelsError(ValueError):
    """An image that cannot be used, and why, as what follows its name."""


@dataclass(frozen=True)
class PixelRules:
    """What is done to every image.

    Attributes:
        size: S, to which images are cropped and resized as in ADM's preprocessing; None = not.
        convert: whether transparent, CMYK and 16-bit images are converted to 8-bit colours.
    """

    size: int | None = None
    convert: bool = False

    def decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Pixels of an image file.

        Args:
            data: PNG, JPEG, WebP or BMP.

        Returns:
            uint8 [H, W, 3], or [S, S, 3].

        Raises:
            PixelsError: if it is damaged, or of a kind that the rules refuse.
        """
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise PixelsError(
                        f"would be {image.width} x {image.height} pixels, more than the "
                        f"{_MOST_PIXELS} that are read"
                    )
                return self._cropped(self._colours(image, data))
        except (PixelsError, MemoryError):
            # A machine without memory is not the image's fault, which would be left out for it.
            raise
        except Exception as error:  # one flipped bit makes Pillow fail in any way
            raise PixelsError(_damage(data, error)) from error

    def crop(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pixels uint8 [H, W, 3] of an array, cropped and resized if that is asked for."""
        return pixels if self.size is None else self._cropped(Image.fromarray(pixels))

    def _cropped(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        if self.size is None:
            return np.array(image)
        if max(image.size) / min(image.size) * self.size**2 > _MOST_PIXELS:
            raise PixelsError(f"is {image.width} x {image.height} pixels, too narrow to be cropped")
        return np.array(center_crop(image, self.size))

    def _colours(self, image: Image.Image, data: bytes) -> Image.Image:
        """The image, of these data, in mode RGB."""
        converts = self.convert or self.size is not None
        frames = getattr(image, "n_frames", 1)
        # Of several photographs in one JPEG the first is the picture.
        if frames > 1 and image.format != "MPO" and not converts:
            raise PixelsError(f"has {frames} frames; --convert takes the first")
        if image.mode in _DEEP_GREYS or _is_deep_colour(image):
            if not converts:
                raise PixelsError("has 16 bits a channel; --convert scales them to 8")
            return _scaled(image, data)
        if image.mode not in _COLOURS + _GREYS and not converts:
            raise PixelsError(f"is {image.mode}, not RGB or grey{_CONVERT}")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if not converts and image.getchannel("A").getextrema()[0] != 255:
                raise PixelsError(f"is transparent in places{_CONVERT}, without its alpha channel")
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, resized as ADM prepares ImageNet (arXiv 2105.05233).

    Halved by averages as long as the short side has twice the pixels, then bicubic to the size.

    Args:
        image: of mode RGB.
        size: S.

    Returns:
        An image of S x S pixels.
    """
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    fitted = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _is_deep_colour(image: Any) -> bool:
    """Whether Pillow would give the upper half of 16 bits a channel without a word."""
    return image.format == "PNG" and any(";16" in str(tile.args) for tile in image.tile)


def _scaled(image: Image.Image, data: bytes) -> Image.Image:
    """An image of 16 bits a channel in 8, each to the nearest level; alpha is left out."""
    if image.mode in _DEEP_GREYS:
        deep = np.asarray(image).clip(0, 65535).astype(np.uint32)
    else:
        deep = np.asarray(image)[..., :3] * np.uint32(256) + _lower_bytes(data)
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")


def _lower_bytes(data: bytes) -> npt.NDArray[np.uint8]:
    """The lower half of each channel of a PNG of 16 bits, of which Pillow gives the upper.

    Told that bytes are in the other order, it takes the lower for the upper. Of grey with alpha it
    knows one order alone, and the upper half stands for both.
    """
    image: Any
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [
            tile._replace(args=_OTHER_ORDER.get(str(tile.args), tile.args)) for tile in image.tile
        ]
        return np.asarray(image)[..., :3]


def _damage(data: bytes, error: Exception) -> str:
    kind = kind_of(data)
    if isinstance(error, Image.DecompressionBombError):
        return f"would be far more pixels than the {_MOST_PIXELS} that are read"
    if kind is not None and not kind.name.endswith(("image", "WebP")):
        return f"is no image but {kind.name}"
    if isinstance(error, UnidentifiedImageError):
        # What it says names the place in memory, which is another one every time.
        return "is no PNG, JPEG, WebP or BMP, or damaged in its first bytes"
    return f"is damaged or truncated ({one_line(error)})"

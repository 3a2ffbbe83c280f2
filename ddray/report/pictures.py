"""Pictures of generated images: bytes, grids, and generators side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddray.errors import ConfigError

_HEADING_LINES = 3  # of labelled_grid: captions are long
_PAPER, _INK = (246, 246, 243), (28, 30, 34)  # of labelled_grid; as in report.css, light


@dataclass(frozen=True, eq=False)
class Picture:
    """Images of one generator, float [N, C, H, W] in [0, 1], filled row by row into `columns`.

    Neighbours with the same columns share their headings: give them the same noise and classes.
    `ink` shows light strokes on black in the colours of the page; None means yes for C = 1.
    """

    name: str
    caption: str
    images: npt.ArrayLike
    columns: int
    column_labels: Sequence[str] = ()
    ink: bool | None = None


def to_uint8(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rounds images to bytes, values beyond [0, 1] clipped.

    Args:
        images: float [N, C, H, W] in [0, 1] with C = 1 or 3.

    Returns:
        uint8 [N, H, W] for C = 1, [N, H, W, 3] for C = 3.

    Raises:
        ConfigError: another shape or dtype, no images, or values that are not a number.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ConfigError(f"images have shape {array.shape}; [N, 1 or 3, H, W] is needed, N >= 1")
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"images are {array.dtype}; floats in [0, 1] are needed: divide by 255")
    if np.isnan(array).any():
        raise ConfigError("images hold NaN; look at the model that made them")
    levels: npt.NDArray[np.uint8] = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return levels[:, 0] if array.shape[1] == 1 else levels.transpose(0, 2, 3, 1)


def grid(
    images: npt.ArrayLike, columns: int, *, scale: int = 1, pad: int = 2, invert: bool = False
) -> Image.Image:
    """Lays images out row by row on black, each pixel drawn as a square of `scale` pixels.

    Args:
        images: float [N, C, H, W] in [0, 1].
        columns: images a row; the last row may be shorter.
        scale: whole enlargement factor, nearest neighbour.
        pad: pixels of the result between images and around them.
        invert: turns the finished picture into its negative: dark digits on white.

    Returns:
        A picture of mode "L" or "RGB", columns * (W * scale + pad) + pad wide.

    Raises:
        ConfigError: images that `to_uint8` refuses, or a columns, scale or pad out of range.
    """
    levels = to_uint8(images)
    if columns < 1 or scale < 1 or pad < 0:
        raise ConfigError(
            f"columns={columns}, scale={scale}, pad={pad}: the least allowed are 1, 1 and 0"
        )
    tiles = levels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = tiles.shape[1] + pad, tiles.shape[2] + pad
    lines = math.ceil(len(tiles) / columns)
    canvas = np.zeros((lines * height + pad, columns * width + pad, *tiles.shape[3:]), np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height + pad, i % columns * width + pad
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return Image.fromarray(255 - canvas if invert else canvas)


def reduced(images: npt.ArrayLike, side: int) -> npt.NDArray[np.floating[Any]]:
    """Images of at most `side` pixels a side: large ones divided by a whole number.

    Args:
        images: float [N, C, H, W] in [0, 1].
        side: the most that is kept.

    Returns:
        float [N, C, h, w]; small images as they are.

    Raises:
        ConfigError: images that `to_uint8` refuses.
    """
    array = np.asarray(images)
    levels = to_uint8(array)
    factor = -(-max(levels.shape[1:3]) // side)
    if factor <= 1:
        return array
    small = np.stack([np.asarray(Image.fromarray(level).reduce(factor)) for level in levels])
    planes = small[:, None] if small.ndim == 3 else small.transpose(0, 3, 1, 2)
    return planes.astype(np.float32) / 255


def grid_mask(images: npt.ArrayLike, columns: int, scale: int, pad: int) -> Image.Image:
    """White where `grid` has an image, black where it has a gap."""
    return grid(np.ones_like(np.asarray(images)[:, :1]), columns, scale=scale, pad=pad)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text) - 1, 0, -1)
    return next((text[:n] + ".." for n in lengths if font.getlength(text[:n] + "..") <= width), "")


def _heading(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> list[str]:
    """A heading in lines of at most `width` pixels; what goes beyond the last one is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (font.getlength(longer) <= width or len(lines) == _HEADING_LINES):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shortened(line, font, width) for line in lines]


def labelled_grid(
    rows: Sequence[tuple[str, npt.ArrayLike]],
    column_labels: Sequence[str] = (),
    *,
    columns: int | None = None,
    scale: int = 2,
    pad: int = 2,
    invert: bool = False,
    font_size: int = 15,
) -> Image.Image:
    """Compares generators in one picture: a block of images each, its name at the left.

    Args:
        rows: (name, float [N, C, H, W] in [0, 1]) of each generator; one column holds what
            belongs together, usually the same noise and class.
        column_labels: headings above the columns, in up to three lines; longer ones are cut.
        columns: images a row; None means one for each heading, or all images where there are none.
        scale: whole enlargement factor, nearest neighbour.
        pad: pixels between images.
        invert: shows each image as its negative, for light digits on black.
        font_size: of names and headings, in pixels.

    Returns:
        A picture of mode "RGB", dark text on light paper.

    Raises:
        ConfigError: no rows, images of several sizes, headings that do not match `columns`,
            or anything that `grid` refuses.
    """
    arrays = [np.asarray(images) for _, images in rows]
    sizes = {array.shape[2:] for array in arrays}
    if len(sizes) != 1:
        raise ConfigError(f"rows hold images of sizes {sorted(sizes)}; one common size is needed")
    if columns is None:
        columns = len(column_labels) or max(len(array) for array in arrays)
    if column_labels and len(column_labels) != columns:
        raise ConfigError(f"{len(column_labels)} column labels for {columns} columns")
    font = ImageFont.load_default(size=font_size)
    blocks = [grid(array, columns, scale=scale, pad=pad, invert=invert) for array in arrays]
    cell = (blocks[0].width - pad) / columns
    headings = [_heading(label, font, cell - pad) for label in column_labels]
    line, gap = math.ceil(1.2 * font_size), font_size
    head = max(map(len, headings)) * line + gap if headings else gap // 2
    left = 2 * gap + math.ceil(max(font.getlength(name) for name, _ in rows))
    height = head + sum(block.height for block in blocks) + gap // 2 * len(blocks)
    page = Image.new("RGB", (left + blocks[0].width + gap, height), _PAPER)
    draw = ImageDraw.Draw(page)
    for k, lines in enumerate(headings):
        for above, text in enumerate(reversed(lines)):
            place = left + pad / 2 + (k + 0.5) * cell, head - gap / 2 - above * line
            draw.text(place, text, _INK, font, anchor="ms")
    top = head
    for (name, _), array, block in zip(rows, arrays, blocks, strict=True):
        draw.text((left - gap, top + block.height / 2), name, _INK, font, anchor="rm")
        page.paste(block, (left, top), grid_mask(array, columns, scale, pad))
        top += block.height + gap // 2
    return page

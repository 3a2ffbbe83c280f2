"""A picture of random rows of an image set: its images, or what its student makes of its tokens.

Shapes: N rows, C channels, H and W pixels.
"""

from functools import partial

import numpy as np
import numpy.typing as npt

from ddray.report.image_file import decode_image
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import planned_student
from ddray.sets.images.shard import ImageRows
from ddray.sets.picture import Columns, decode_tokens, draw_rows, picture_place


def write_picture(uri: str, path: str) -> None:
    """Draw random rows; see `ddray.sets.picture.draw_rows`.

    Args:
        uri: of the set.
        path: path or URI of the picture, which ends in .png.

    Raises:
        ConfigError: for another ending, or, for tokens, a student that is not here.
        ShardError: if the student has other weights, or there is nothing to draw.
        StorageError: if the picture cannot be written.
    """
    storage, name = picture_place(path)
    images = ImageSet.open(uri)
    storage.check_writable()
    decode = _decode_files
    if images.plan.content == "tokens":
        decode = partial(decode_tokens, planned_student(images.plan, "cpu"))
    storage.write(name, draw_rows(images, _columns, decode, images.plan.class_names))


def _columns(rows: ImageRows) -> Columns:
    return rows.index, rows.label, rows.content


def _decode_files(files: list[bytes]) -> npt.NDArray[np.float32]:
    """Images float32 [N, C, H, W] in [0, 1] of N image files."""
    levels = np.stack([decode_image(file) for file in files])
    pixels: npt.NDArray[np.float32] = levels.astype(np.float32) / np.float32(255)
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)

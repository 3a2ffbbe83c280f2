"""`samples.npz`: the pixels of a whole set in one array, as evaluators of generated images read it.

`arr_0` is uint8 [N, H, W, 3] in the order of the indices, grey as three equal channels. It is
written image by image, so memory does not grow with N.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt

from ddray.progress import Progress
from ddray.report.image_file import decode_image
from ddray.sets.images.image_set import SAMPLES, ImageSet
from ddray.storage.image_array import npz_chunks


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


def _pixels(images: ImageSet) -> Iterator[npt.NDArray[np.uint8]]:
    """Pixels [H, W, 3] of each image."""
    with Progress(SAMPLES, images.plan.count, "images") as bar:
        bar.begin()
        for k in range(images.plan.num_shards):
            for file in images.read_shard(k).content:
                pixels = decode_image(file)
                yield pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1)
                bar.advance_to(bar.done + 1)

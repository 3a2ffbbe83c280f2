"""Batches of a shard as they come from a student, turned into what the shard holds.

Compression runs in threads of its own, a bounded number of batches behind the student, who goes on
meanwhile. Imports ddray.image_file, image_plan and prefetch; no torch.

Shapes: B rows of a batch, L all tokens, H and W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.image_file import encode_png, encode_webp
from ddray.image_plan import ImagePlan
from ddray.prefetch import in_order


class BatchEncoder:
    """Makes image files of pixels.

    Args:
        plan: of the set.
        threads: that compress.
        measure: what makes statistics of a batch's pixels; None = there are none.
    """

    def __init__(
        self,
        plan: ImagePlan,
        threads: int,
        measure: Callable[[npt.NDArray[np.uint8]], Any] | None = None,
    ):
        self._plan, self._threads, self._measure = plan, threads, measure
        self._pool = ThreadPoolExecutor(threads, "encode")

    def encode(
        self, batches: Iterable[npt.NDArray[Any]]
    ) -> tuple[Sequence[bytes] | npt.NDArray[Any], list[Any]]:
        """The content of a shard, and the statistics of each of its batches.

        Args:
            batches: pixels uint8 [B, H, W] or [B, H, W, 3], or tokens [B, L]; made while earlier
                ones are compressed, and never more than the threads have work with.
        """
        if self._plan.content == "tokens":
            return np.concatenate([*batches]).astype(self._plan.token_dtype), []
        files: list[bytes] = []
        measured = []
        for encoded, statistics in in_order(
            lambda pixels: self._pool.submit(self._encode, pixels), batches, self._threads + 1
        ):
            files += encoded
            measured.append(statistics)
        return files, measured

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> tuple[list[bytes], Any]:
        statistics = self._measure(pixels) if self._measure else None
        if self._plan.image_format == "png":
            return [encode_png(image) for image in pixels], statistics
        return [encode_webp(image, self._plan.quality) for image in pixels], statistics

"""Shards of an image set, made of what a student answers batch by batch.

Compression runs in threads of its own, a bounded number of batches behind the student, who goes on
meanwhile.

Shapes: N rows of a shard, B rows of a batch, L all tokens, H and W pixels.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ddray.prefetch import in_order
from ddray.report.image_file import encode_png, encode_webp
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.orders import RowsOrder, orders_of

if TYPE_CHECKING:
    from ddray.metrics.fd_digits import DigitsMetric
    from ddray.metrics.frechet import FeatureSums

Batches = Generator[npt.NDArray[Any], None, None]
# Files of a batch, and its statistics if they are wanted.
Encoded = tuple[list[bytes], list["FeatureSums"]]


class ShardMaker:
    """Makes and commits shards.

    Args:
        images: the set.
        encoders: threads that compress.
        digits: whether to make sums of the bundled digit classifier's features as well.
    """

    def __init__(self, images: ImageSet, encoders: int, digits: bool = False):
        self._images, self._encoders = images, encoders
        self._metric: DigitsMetric | None = None
        initializer = None
        if digits:
            import torch

            from ddray.metrics import fd_digits
            from ddray.models.zoo import METRIC_FOLDER

            self._metric = fd_digits.DigitsMetric(METRIC_FOLDER)

            # Sums vary with the threads that share them, so it is always one.
            def initializer() -> None:
                torch.set_num_threads(1)

        self._pool = ThreadPoolExecutor(encoders, "encode", initializer)

    def make(
        self,
        k: int,
        ask: Callable[[Iterator[RowsOrder]], Batches],
        model: str = "",
        statistics: Callable[[], bytes] | None = None,
    ) -> int:
        """Make shard `k`, and say how many rows it has.

        Args:
            k: which shard.
            ask: has batches made in their order: pixels uint8 [B, H, W] or [B, H, W, 3], or tokens
                [B, L].
            model: name of the student where it is asked.
            statistics: what lies beside the shard, once its batches are made; None where it is
                nothing, or sums of digits.
        """
        labels = []
        asked_for = orders_of(self._images, k, model)

        def orders() -> Iterator[RowsOrder]:
            for order in asked_for:
                labels.append(order.labels)
                yield order

        content: Sequence[bytes] | npt.NDArray[Any]
        sums: list[FeatureSums] = []
        # A shard that fails here must not keep its turn on the device.
        with closing(ask(orders())) as batches:
            if self._images.plan.content == "tokens":
                content = np.concatenate([*batches])
            else:
                content = []
                for files, measured in in_order(self._begin, batches, self._encoders + 1):
                    content += files
                    sums += measured
        beside = statistics() if statistics is not None else None
        if self._metric is not None:
            beside = reduce(add, sums).to_bytes(self._metric.fingerprint)
        self._images.write_shard(k, np.concatenate(labels), content, beside)
        return len(content)

    def _begin(self, pixels: npt.NDArray[np.uint8]) -> Future[Encoded]:
        return self._pool.submit(self._encode, pixels)

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Encoded:
        """Files of a batch, and its statistics if they are wanted."""
        plan = self._images.plan
        fast = plan.compression == "fast"
        if plan.image_format == "png":
            files = [encode_png(image, fast=fast) for image in pixels]
        else:
            files = [encode_webp(image, plan.quality, fast=fast) for image in pixels]
        return files, [self._metric.sums(pixels)] if self._metric else []

"""Workers of a pool that write shards of images: with a student each, or asking a replica."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddray.errors import ClusterError, one_line
from ddray.prefetch import in_order
from ddray.runtime.pools.device import BATCHES_AHEAD, Device
from ddray.sets.images.encoding import ShardMaker
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.orders import RowsOrder
from ddray.sets.makers import maker_on

if TYPE_CHECKING:
    import numpy.typing as npt

    from ddray.serving.rendering import Renderer
    from ddray.sets.images.statistics import NetworkOrder
    from ddray.text.encoder import TimedEncoder

# A replica that dies is replaced, and requests find another one as soon as Serve knows.
_RETRY_S = 1.0
_BUSY_RETRY_S = 0.2


class StudentWorker:
    """Holds a student on one device, which goes on while the last batches are compressed.

    Args:
        uri: of the image set.
        device: "cpu" or "cuda".
        encoders: threads that compress.
        statistics: whose features' statistics to make as well; see `ImageSet`.
        network: which network these are of; None for digits, or none.
    """

    def __init__(
        self,
        uri: str,
        device: str,
        encoders: int,
        statistics: str = "",
        network: "NetworkOrder | None" = None,
    ):
        images = self._images = ImageSet.open(uri)
        images.statistics = statistics
        self._device = Device(images.plan.threads)
        self._renderer, self._encode = self._device.load(lambda: _load(images, device))
        self._network = self._device.load(lambda: network.load(device) if network else None)
        self._shards = ShardMaker(images, encoders, statistics == "digits")
        self.maker = maker_on(self._renderer.student.device)

    @property
    def encoding_s(self) -> float:
        """Time that went into features of captions so far."""
        return self._encode.seconds if self._encode else 0.0

    def do(self, shard: int) -> int:
        """Generate and write one shard."""
        if self._network is None:
            return self._shards.make(
                shard, lambda orders: self._device.batches(self._renderer.rows, orders)
            )
        from ddray.sets.images.statistics import features_of, joined

        network, features = self._network, []

        # On the device's own thread, where nothing else changes what float32 means meanwhile.
        def rows(order: RowsOrder) -> "npt.NDArray[Any]":
            pixels = self._renderer.rows(order)
            features.append(features_of(network, pixels))
            return pixels

        return self._shards.make(
            shard,
            lambda orders: self._device.batches(rows, orders),
            statistics=lambda: joined(
                self._images.plan.shard_range(shard)[0], features, network.fingerprint
            ),
        )


class HandleWorker:
    """Asks the replicas of a Serve deployment, a bounded number of batches at a time.

    Args:
        uri: of the image set.
        application: of Serve.
        deployment: whose replicas have a method `rows`.
        model: what they call the student.
        retries: of a batch whose replica died.
        encoders: threads that compress.
        statistics: "digits" to make statistics of these as well, else "".
    """

    def __init__(
        self,
        uri: str,
        application: str,
        deployment: str,
        model: str,
        retries: int,
        encoders: int,
        statistics: str,
    ):
        from ray import serve

        self._model, self._retries = model, retries
        images = ImageSet.open(uri)
        images.statistics = statistics
        self._shards = ShardMaker(images, encoders, statistics == "digits")
        self._rows = serve.get_deployment_handle(deployment, application).rows

    def do(self, shard: int) -> int:
        """Have one shard generated, and write it."""
        return self._shards.make(
            shard, lambda orders: in_order(self._ask, orders, BATCHES_AHEAD), self._model
        )

    def _ask(self, order: RowsOrder) -> "_Reply":
        return _Reply(lambda: self._rows.remote(order), self._retries)


class _Reply:
    """Rows that a replica makes; they may be asked for again, for they would be the same.

    Args:
        ask: sends the request.
        retries: how often it is sent again after a replica has died.
    """

    def __init__(self, ask: Callable[[], Any], retries: int):
        self._ask, self._retries = ask, retries
        self._sent = ask()

    def result(self) -> "npt.NDArray[Any]":
        """Wait for the rows.

        Raises:
            ClusterError: if replicas keep dying.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError

        left = self._retries
        while True:
            try:
                return self._sent.result()
            except RayTaskError:
                # What the student itself refuses, it would refuse again.
                raise
            except BackPressureError:
                # Requests of others have filled the queue; it is not their fault nor ours.
                time.sleep(_BUSY_RETRY_S)
            except RayError as error:
                if not left:
                    raise ClusterError(
                        f"a batch was lost {self._retries + 1} times with its replica "
                        f"({one_line(error)}); look at why replicas die, or give more --max-retries"
                    ) from error
                left -= 1
                time.sleep(_RETRY_S)
            self._sent = self._ask()


def _load(images: ImageSet, device: str) -> "tuple[Renderer, TimedEncoder | None]":
    from ddray.serving.rendering import Renderer
    from ddray.sets.conditions import load_timed_encoder
    from ddray.sets.images.making import planned_student

    student = planned_student(images.plan, device)
    encode = load_timed_encoder(images.plan, student)
    return Renderer(student, encoder=encode), encode

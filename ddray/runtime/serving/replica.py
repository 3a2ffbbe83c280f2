"""A replica of the image service: students on one device, and what shares it."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import metrics

from ddray.runtime.serving.access import NEXT_TO_NOTHING
from ddray.serving.batching import Batcher
from ddray.serving.image_file import image_bytes
from ddray.serving.order import Order

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ddray.serving.rendering import Renderer
    from ddray.sets.images.orders import RowsOrder

log = logging.getLogger("ray.serve")

# A batch that has succeeded so lately is a better sign than a test.
_FRESH_S = 5.0
_ENCODERS = 2
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_IMAGES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@dataclass(frozen=True)
class Stock:
    """What replicas hold.

    Attributes:
        students: name in requests -> bundled name or model folder.
        teacher: whether each student's teacher is there too.
        text_encoder: of captions; None = the one that the student was trained with.
        rows: of the largest forward pass; None = what suits the device.
        threads: CPU threads of the model.
        in_memory: students that are kept loaded.
        device: "cpu", or "cuda" where a GPU is reserved.
        dtype: of the networks, as `load_student` takes it.
        decode_dtype: of the decoder, likewise; None = what suits the networks'.
    """

    students: dict[str, str]
    teacher: bool
    text_encoder: str | None
    rows: int | None
    threads: int
    in_memory: int
    device: str
    dtype: str
    decode_dtype: str | None = None


@dataclass(frozen=True)
class _Kind:
    """Requests that one batch may mix."""

    model: str
    schedule: str
    # The teacher takes one seed a call.
    seed: int | None


class StudentReplica:
    """Students on one device, which make the images of concurrent requests in common batches.

    Args:
        stock: what to load.
    """

    async def __init__(self, stock: Stock):  # type: ignore[misc]
        import torch

        from ddray.serving.rendering import TextEncoders

        self._stock, self._text_encoders = stock, TextEncoders()
        # One thread runs the models, so that Serve's event loop stays free to answer health checks
        # and to collect requests. OpenMP's number of threads is set there: it is per thread.
        self._device = ThreadPoolExecutor(1, "device", torch.set_num_threads, (stock.threads,))
        # PIL releases the GIL while it compresses, so the device goes on meanwhile.
        self._encoders = ThreadPoolExecutor(_ENCODERS, "encode")
        self._batcher: Batcher[Order, npt.NDArray[np.uint8]] = Batcher(
            self._run, limit=1, started=self._started
        )
        self._rows_turn = asyncio.Lock()
        self._succeeded_at, self._model = 0.0, next(iter(stock.students))
        # A device that is at one batch for longer is broken.
        self._hung_s = math.inf
        # When what the device is at should be done; None = it is at nothing.
        self._due: float | None = None
        self._stage_s = metrics.Histogram(
            "ddray_stage_seconds",
            "Time of a request in the queue, in the model, in the encoder.",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._batch_images = metrics.Histogram(
            "ddray_batch_images", "Images of a batch.", boundaries=_IMAGES
        )
        self._queued = metrics.Gauge("ddray_queued_images", "Images that wait for the device.")
        self._images = metrics.Counter(
            "ddray_images_total", "Images made.", tag_keys=("model", "schedule")
        )
        self._encodings = metrics.Counter(
            "ddray_captions_encoded_total",
            "Captions that the encoder has read; the others were still known.",
            tag_keys=("model",),
        )

        async def load(name: str) -> "Renderer":
            return await self._on_device(self._load, name)

        # The least recently used ones leave when there are too many.
        self._renderer = serve.multiplexed(load, max_num_models_per_replica=stock.in_memory)
        for name in list(stock.students)[: stock.in_memory]:
            await self._renderer(name)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new batch size, wait and limit; requests under way are not disturbed."""
        self._batcher.limit = int(user_config["max_batch_size"])
        self._batcher.wait_s = float(user_config["batch_wait_s"])
        self._hung_s = float(user_config["hung_s"])

    async def ready(self) -> bool:
        """An answer means that the replica is warm."""
        return True

    async def images(self, order: Order) -> list[bytes]:
        """Image files of one request, in order; it shares batches with other requests."""
        seed = order.seed if "teacher" in order.schedule else None
        kind = _Kind(order.model, order.schedule, seed)
        try:
            pixels = await self._batcher(kind, order, order.n)
        except asyncio.CancelledError:
            # Where all that waited have left, no batch follows that would tell.
            self._queued.set(self._batcher.queued)
            raise
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(self._encoders, _encode, pixels, order)
        self._stage_s.observe(time.perf_counter() - began, {"stage": "encode"})
        return files

    async def rows(self, order: "RowsOrder") -> "npt.NDArray[Any]":
        """A batch of a data set, as `Renderer.rows`; it takes its turn between online batches."""
        renderer = await self._renderer(order.model)
        # One at a time stands before the device: an online request never waits for two.
        async with self._rows_turn:
            rows = await self._at_work(renderer.rows, order)
        self._batch_images.observe(len(rows))
        self._succeed(renderer, order.model, order.schedule, len(rows))
        return rows

    async def holds(self, model: str) -> dict[str, Any] | None:
        """What decides the rows of a student here; None where there is no such student."""
        if model not in self._stock.students:
            return None
        return {**(await self._renderer(model)).held, "threads": self._stock.threads}

    async def check_health(self) -> None:
        """Make one image, unless a batch has succeeded just now or is under way.

        Raises:
            RuntimeError: if the device does not come back from a batch.
            Exception: whatever the model raises, as after an error of a GPU; Serve then replaces
                the replica, as it does where no answer comes.
        """
        now, due = time.monotonic(), self._due
        if due is not None and now > due:
            raise RuntimeError(f"a batch has taken more than {self._hung_s:g} s")
        # Behind a slow batch, or a student that is being loaded, one image could wait too long.
        if due is not None or now - self._succeeded_at < _FRESH_S:
            return
        from ddray.serving.rendering import ImageJob

        # Of the student of late: another one might have to be loaded in its place.
        renderer = await self._renderer(self._model)
        await self._at_work(renderer.images, [ImageJob(renderer.some_prompts[0], 0, 0)], "0")
        self._succeeded_at = time.monotonic()

    async def _run(self, kind: _Kind, orders: list[Order]) -> Sequence["npt.NDArray[np.uint8]"]:
        """Pixels of each order."""
        from ddray.serving.rendering import ImageJob

        renderer = await self._renderer(kind.model)
        jobs = [ImageJob(order.prompt, k, order.seed) for order in orders for k in range(order.n)]
        began = time.perf_counter()
        pixels = await self._at_work(renderer.images, jobs, kind.schedule)
        self._stage_s.observe(time.perf_counter() - began, {"stage": "model"})
        self._succeed(renderer, kind.model, kind.schedule, len(jobs))
        parts, done = [], 0
        for order in orders:
            parts.append(pixels[done : done + order.n])
            done += order.n
        return parts

    def _started(self, images: int, waited_s: list[float]) -> None:
        self._batch_images.observe(images)
        for seconds in waited_s:
            self._stage_s.observe(seconds, {"stage": "queue"})
        self._queued.set(self._batcher.queued)

    def _succeed(self, renderer: "Renderer", model: str, schedule: str, images: int) -> None:
        self._succeeded_at, self._model = time.monotonic(), model
        # Schedules of clients' own would each be a series of their own.
        shown = schedule if "teacher" not in schedule else "with teacher"
        self._images.inc(images, {"model": model, "schedule": shown})
        self._encodings.inc(renderer.new_encodings() or NEXT_TO_NOTHING, {"model": model})

    async def _at_work(self, function: Any, *arguments: Any) -> Any:
        return await self._on_device(function, *arguments, limit_s=self._hung_s)

    async def _on_device(self, function: Any, *arguments: Any, limit_s: float = math.inf) -> Any:
        def work() -> Any:
            self._due = time.monotonic() + limit_s
            try:
                return function(*arguments)
            finally:
                self._due = None

        return await asyncio.get_running_loop().run_in_executor(self._device, work)

    def _load(self, name: str) -> "Renderer":
        """Load a student and warm it up, since the first passes are the slow ones."""
        from ddray.serving.rendering import ImageJob, Renderer

        stock, started = self._stock, time.perf_counter()
        renderer = Renderer.load(
            stock.students[name],
            teacher=stock.teacher,
            text_encoder=stock.text_encoder,
            encoders=self._text_encoders,
            rows=stock.rows,
            device=stock.device,
            dtype=stock.dtype,
            decode_dtype=stock.decode_dtype,
        )
        loaded = time.perf_counter()
        prompt = renderer.some_prompts[0]
        for schedule in {"0", renderer.schedule, *(["teacher"] if stock.teacher else [])}:
            renderer.images([ImageJob(prompt, 0, 0)], schedule)
        log.info(
            "student %s on %s: loaded in %.1f s, warmed up in %.1f s, passes of %s rows",
            *(name, renderer.student.device, loaded - started, time.perf_counter() - loaded),
            ", ".join(map(str, renderer.sizes)),
        )
        return renderer


def _encode(pixels: "npt.NDArray[np.uint8]", order: Order) -> list[bytes]:
    return [image_bytes(image, order.output_format, order.quality) for image in pixels]

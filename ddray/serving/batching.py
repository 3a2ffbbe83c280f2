"""Batches for one device out of requests that arrive whenever they like. Plain asyncio.

A batch is put together at the moment the device is free for it, from all that waits by then: under
load batches are full without anybody waiting for company, and an idle device starts at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(eq=False)
class _Waiting(Generic[ItemT]):
    """A request in the queue."""

    kind: Hashable
    item: ItemT
    size: int
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[ItemT, ResultT]):
    """Runs requests of the same kind together, one batch at a time.

    The oldest request decides of which kind the next batch is, so none starves. One whose caller
    has gone away is dropped.

    Args:
        run: (kind, items) -> a result for each, in order; what it raises, all of them raise.
        limit: the most that a batch may hold, in units of the requests' sizes. A larger request
            makes a batch of its own.
        wait_s: how long the oldest request waits for others on an idle device.
        started: told the size of each batch and the seconds that its requests have waited.
    """

    def __init__(
        self,
        run: Callable[[Any, list[ItemT]], Awaitable[Sequence[ResultT]]],
        limit: int,
        wait_s: float = 0.0,
        started: Callable[[int, list[float]], None] = lambda size, waited_s: None,
    ):
        self.limit, self.wait_s = limit, wait_s
        self._run, self._started = run, started
        self._queue: list[_Waiting[ItemT]] = []
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """What waits, in units of the requests' sizes."""
        return sum(waiting.size for waiting in self._queue if not waiting.answer.cancelled())

    async def __call__(self, kind: Hashable, item: ItemT, size: int = 1) -> ResultT:
        """The result of a request.

        Args:
            kind: requests of equal kinds may share a batch.
            item: what `run` is given.
            size: its share of the limit.
        """
        answer: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(kind, item, size, answer))
        self._arrived.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        """Until nothing waits."""
        while self._queue:
            await self._fill()
            batch = self._take()
            if not batch:
                continue
            now = time.monotonic()
            size = sum(waiting.size for waiting in batch)
            try:
                self._started(size, [now - waiting.since for waiting in batch])
                results = await self._run(batch[0].kind, [waiting.item for waiting in batch])
                answers = list(zip(batch, results, strict=True))
            except BaseException as error:
                # Whatever ended the batch, nobody may wait for ever.
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                if not isinstance(error, Exception):
                    raise
                continue
            for waiting, result in answers:
                if not waiting.answer.done():
                    waiting.answer.set_result(result)

    async def _fill(self) -> None:
        """Wait for company, no longer than the oldest request may be kept."""
        until = self._queue[0].since + self.wait_s
        while self.queued < self.limit and (left_s := until - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting[ItemT]]:
        """Remove the next batch from the queue: the oldest request and what fits to it."""
        self._queue = [waiting for waiting in self._queue if not waiting.answer.cancelled()]
        batch: list[_Waiting[ItemT]] = []
        size = 0
        for waiting in self._queue:
            alike = not batch or waiting.kind == batch[0].kind
            if alike and (not batch or size + waiting.size <= self.limit):
                batch.append(waiting)
                size += waiting.size
        taken = set(map(id, batch))
        self._queue = [waiting for waiting in self._queue if id(waiting) not in taken]
        return batch

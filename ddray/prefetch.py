"""The next items of an iterator, made while the last one is used."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

T = TypeVar("T")
ResultT = TypeVar("ResultT", covariant=True)


class Pending(Protocol[ResultT]):
    """Something that is under way, such as a `concurrent.futures.Future`."""

    def result(self) -> ResultT:
        """Wait for it."""


def in_order(
    begin: Callable[[T], Pending[ResultT]], items: Iterable[T], depth: int
) -> Generator[ResultT, None, None]:
    """Results in the order of the items, of which so many are under way at once.

    Args:
        begin: starts the work on an item.
        items: taken one by one, never more than `depth` ahead of the results.
        depth: at least 1.
    """
    under_way: deque[Pending[ResultT]] = deque()
    for item in items:
        under_way.append(begin(item))
        if len(under_way) >= depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


class Prefetch(Iterator[T], Generic[T]):
    """Items of an iterator in their order, a few of them made ahead by one background thread.

    What the iterator raises is raised where the item would have been taken.

    Args:
        items: used by the thread alone.
        depth: items that are made before they are asked for.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._items = items
        self._room = threading.Semaphore(depth)
        self._ready: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name="ddray-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._failure is None:
            made = self._ready.get()
            self._room.release()
            if isinstance(made, tuple):
                return made[0]
            self._failure = made
        raise self._failure

    @property
    def ready(self) -> bool:
        """Whether `next` would not wait."""
        return self._failure is not None or not self._ready.empty()

    def close(self) -> None:
        """End the thread, once it has finished its item; nothing more is given out."""
        self._closed = True
        self._room.release()
        self._thread.join()
        self._failure = self._failure or StopIteration()
        # For somebody who waits for an item.
        self._ready.put(self._failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put((next(self._items),))
        except BaseException as error:  # to be raised where the item is waited for
            self._ready.put(error)

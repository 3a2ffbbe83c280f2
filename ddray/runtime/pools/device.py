"""The device of an actor that has several shards under way: one at a time is made there.

The next shard's batches follow as soon as the last one's are made, while these are compressed and
written. A shard's bytes are those of a worker that does one thing after the other.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from ddray.prefetch import in_order

# While one shard is written, the next one is made.
SHARDS_AT_ONCE = 2
# One batch under way and the next one waiting for it: whoever makes them never waits for us.
BATCHES_AHEAD = 2

T = TypeVar("T")
R = TypeVar("R")


class Device:
    """One thread that runs a worker's model, and whose turn it is.

    Args:
        threads: of the model on a CPU.
    """

    def __init__(self, threads: int):
        import torch

        # OpenMP's number of threads belongs to the thread that asks for it.
        self._thread = ThreadPoolExecutor(1, "device", torch.set_num_threads, (threads,))
        self._turn = Lock()

    def load(self, load: Callable[[], T]) -> T:
        """What `load` returns, called on the device's thread."""
        return self._thread.submit(load).result()

    def batches(self, make: Callable[[T], R], orders: Iterable[T], /) -> Generator[R, None, None]:
        """A shard's batches in order; nobody else's are made until the last one is, or `close`.

        Args:
            make: called on the device's thread.
            orders: what it is given, a few ahead of the batches that are taken.
        """
        with self._turn:
            yield from in_order(
                lambda order: self._thread.submit(make, order), orders, BATCHES_AHEAD
            )

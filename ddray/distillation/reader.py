"""The shards of a trajectory set as a worker holds them: read once, shared, let go, waited for.

`TrajectoryStream` makes batches of what is here.

Shapes: N rows of a shard, L tokens.
"""

import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.distillation.order import BlockCursor, ShardOrder
from ddray.errors import ShardError
from ddray.sets.conditions import Conditions, read_conditions
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.text.encoder import TextEncoder


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of a shard in memory, N of them.

    Attributes:
        index: int64 [N].
        tokens: unsigned int [N, L].
        conditions: of the N rows.
    """

    index: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any]
    conditions: Conditions


class Arrivals:
    """Waits for the shards of a set that is still being sampled.

    Attributes:
        waiting: What is waited for, and for how long; None while nothing is.
    """

    def __init__(self, trajectories: TrajectorySet, poll_s: float, stall_timeout_s: float):
        self._trajectories = trajectories
        self._poll_s, self._stall_timeout_s = poll_s, stall_timeout_s
        self._missing = {*trajectories.missing()}
        self._closed = threading.Event()
        self.waiting: str | None = None

    def __contains__(self, k: int) -> bool:
        """Whether a shard was there when somebody last looked."""
        return k not in self._missing

    def wait(self, k: int) -> None:
        """Return once shard `k` is there.

        Raises:
            ShardError: if no new shard has come for so long, or the stream was closed.
        """
        since = latest = time.monotonic()
        try:
            while k in self._missing:
                missing, now = {*self._trajectories.missing()}, time.monotonic()
                if missing < self._missing:
                    latest = now
                self._missing = missing
                if k not in missing:
                    return
                self.waiting = f"waiting for shard {k} for {now - since:.0f} s"
                if now - latest >= self._stall_timeout_s:
                    raise ShardError(
                        f"{self._trajectories.uri} got no new shard for {now - latest:.0f} s, and "
                        f"shard {k} is not there; see whether `ddray sample` still runs, or raise "
                        "stall_timeout_s"
                    )
                if self._closed.wait(self._poll_s):
                    raise ShardError(f"closed while waiting for shard {k}")
        finally:
            self.waiting = None

    def close(self) -> None:
        """End a wait."""
        self._closed.set()


class ShardReader:
    """Reads each shard once as long as somebody holds it; keeps all of a small set.

    Args:
        trajectories: the set.
        encode: of its captions, where the plan has an encoder.
        keep: whether shards stay in memory that nobody holds.
        arrivals: of a set that is still being sampled.
    """

    def __init__(
        self,
        trajectories: TrajectorySet,
        encode: TextEncoder | None,
        keep: bool,
        arrivals: Arrivals | None,
    ):
        self._trajectories, self._encode = trajectories, encode
        self._keep, self._arrivals = keep, arrivals
        self._kept: list[Shard] = []
        self._held: weakref.WeakValueDictionary[int, Shard] = weakref.WeakValueDictionary()

    @property
    def rows(self) -> int:
        """Rows in memory."""
        held = [reference() for reference in self._held.valuerefs()]
        return sum(len(shard.index) for shard in held if shard is not None)

    def is_there(self, k: int) -> bool:
        """Whether reading a shard would not wait."""
        return self._arrivals is None or k in self._arrivals

    def read(self, k: int) -> Shard:
        """The verified rows of a shard.

        Raises:
            ShardError: if it is missing or damaged, or its captions are others.
            StorageError: if it cannot be read.
        """
        shard = self._held.get(k)
        if shard is None:
            if self._arrivals is not None:
                self._arrivals.wait(k)
            shard = self._load(k)
            self._held[k] = shard
            if self._keep:
                self._kept.append(shard)
        return shard

    def _load(self, k: int) -> Shard:
        index, label, tokens = self._trajectories.read_shard(k)
        if self._trajectories.plan.conditioning == "class":
            return Shard(index, tokens, Conditions(label))
        conditions = read_conditions(self._trajectories, [k], self._encode)
        if not np.array_equal(conditions.label, label):
            raise ShardError(
                f"{self._trajectories.uri} was sampled from other captions than it holds, in shard "
                f"{k}"
            )
        return Shard(index, tokens, conditions)


class Lane:
    """The rows of one lane: the block that is read from, and what is there of the next one."""

    def __init__(self, order: ShardOrder, number: int, reader: ShardReader):
        self._order, self._number, self._reader = order, number, reader
        self._cursor = BlockCursor(order, number)
        self._block = -1
        self._shards: list[Shard] = []
        self._starts: list[int] = []
        self._rows = np.empty(0, np.int64)
        self._coming: list[int] = []
        self._ahead: list[Shard] = []

    def shards_at(self, row: int) -> list[int]:
        """Shards that must be in memory to give out a row of the lane's stream."""
        self._cursor.seek(row)
        return self._cursor.shards

    def take(self, first: int, amount: int) -> Iterator[tuple[Shard, int]]:
        """Shard, and row in it, of rows first, ..., first + amount - 1 of the lane's stream."""
        for row in range(first, first + amount):
            self._cursor.seek(row)
            if self._cursor.number != self._block:
                self._enter_block()
            place = int(self._rows[row - self._cursor.first])
            shard = bisect_right(self._starts, place) - 1
            yield self._shards[shard], place - self._starts[shard]

    def read_ahead(self, row: int, phase: float) -> None:
        """Read the next block's shards, in the measure in which this one is used up.

        Args:
            row: of the lane's stream, the next to be given out.
            phase: 0 to 1, how much earlier than others this lane reads, so that they take turns.
        """
        done = (row - self._cursor.first) / self._cursor.rows
        due = int(done * len(self._coming) + phase)
        for k in self._coming[len(self._ahead) : due]:
            if not self._reader.is_there(k):
                return
            self._ahead.append(self._reader.read(k))

    def _enter_block(self) -> None:
        # The old block goes first: what was read ahead and one block is the most that is held.
        self._shards.clear()
        self._shards = [self._reader.read(k) for k in self._cursor.shards]
        self._ahead.clear()
        sizes = [len(shard.index) for shard in self._shards]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._rows = self._order.block_rows(self._number, self._cursor.number)
        self._coming = self._order.block(self._number, self._cursor.number + 1)
        self._block = self._cursor.number

"""Which rows of a trajectory set a step trains on: arithmetic alone, nothing is read.

An endless sequence of shards, each epoch one permutation of all, is dealt to G lanes in turn: lane
l takes entries l, l + G, l + 2G, ... So every shard is dealt once an epoch, whatever its length. A
lane reads its shards in blocks of one or a few and permutes the rows of a block. Each lane gives
B / G rows of its own to every batch of B, and slot j of the batch belongs to lane j * G // B. A
worker reads whole lanes: the batch of a step is the same for every number of workers that divides
G.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError, ShardError
from ddray.sets.trajectories.plan import TrajectoryPlan

_MOST_LANES = 64
_USUAL_WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# What a random order is for, so that no two share numbers.
_SHARDS, _ROWS = 0, 1
_EPOCHS_KEPT = 1024


def default_lanes(batch_size: int, workers: int = 1, most: int = _MOST_LANES) -> int:
    """Lanes for a run: of the divisors of the batch the one that most numbers of workers divide.

    Args:
        batch_size: rows of a step over all workers, a multiple of `workers`.
        workers: how many the run begins with; they divide the result.
        most: lanes at most, but for as many as there are workers. Under `follow` the first step
            waits for as many shards as there are lanes.

    Raises:
        ConfigError: if the workers do not divide the batch.
    """
    if batch_size % workers:
        raise ConfigError(f"batch_size={batch_size} must be a multiple of workers={workers}")
    candidates = [
        lanes
        for lanes in range(workers, max(most, workers) + 1, workers)
        if batch_size % lanes == 0
    ]
    return max(candidates, key=lambda g: (sum(g % w == 0 for w in _USUAL_WORKERS), g))


class ShardOrder:
    """The order of a run's rows: a function of the shards and a few settings.

    Args:
        plan: of the set.
        shards: those that are trained on; None = all.
        seed: of the order.
        lanes: G.
        buffer_shards: shards of a block. One, as the lanes mix already, uses rows most evenly:
            after every G shards each row of these was used once. More are for few lanes.
        follow: take the shards of the first epoch as they are written, in the order of their
            numbers and each as a block of its own, so that a set can be trained on as it grows.

    Raises:
        ConfigError: for a number that is not positive.
        ShardError: without shards, or for one that the plan does not have.
    """

    def __init__(
        self,
        plan: TrajectoryPlan,
        *,
        shards: Sequence[int] | None = None,
        seed: int = 0,
        lanes: int,
        buffer_shards: int = 1,
        follow: bool = False,
    ):
        for name, value in (("lanes", lanes), ("buffer_shards", buffer_shards)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be a positive integer")
        self.shards = tuple(range(plan.num_shards) if shards is None else sorted({*shards}))
        if not self.shards:
            raise ShardError("the trajectory set has no shard to train on")
        self.rows = {k: len(plan.shard_range(k)) for k in self.shards}
        self.seed, self.lanes, self.buffer_shards = seed, lanes, buffer_shards
        self.follow = follow
        self._plan_hash = plan.hash
        self._permutation = lru_cache(_EPOCHS_KEPT)(self._permute_epoch)

    def identity(self) -> dict[str, Any]:
        """What two orders that are the same have in common, as JSON values."""
        shards = json.dumps([self._plan_hash, *self.rows.items()])
        return {
            "seed": self.seed,
            "lanes": self.lanes,
            "buffer_shards": self.buffer_shards,
            "follow": self.follow,
            "shards": hashlib.sha256(shards.encode()).hexdigest()[:16],
        }

    def block(self, lane: int, number: int) -> list[int]:
        """The shards of a block of a lane, counted from 0."""
        # Under `follow`, that many entries of the first epoch are blocks of one shard.
        single = len(range(lane, len(self.shards), self.lanes)) if self.follow else 0
        if number < single:
            first, stop = number, number + 1
        else:
            first = single + (number - single) * self.buffer_shards
            stop = first + self.buffer_shards
        return [self._dealt(lane + self.lanes * entry) for entry in range(first, stop)]

    def block_rows(self, lane: int, number: int) -> npt.NDArray[np.int64]:
        """The order of a block's rows: a permutation of as many as its shards have."""
        count = sum(self.rows[k] for k in self.block(lane, number))
        return self._random(_ROWS, lane, number).permutation(count)

    def _dealt(self, entry: int) -> int:
        epoch, place = divmod(entry, len(self.shards))
        if self.follow and epoch == 0:
            return self.shards[place]
        return self.shards[self._permutation(epoch)[place]]

    def _permute_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return self._random(_SHARDS, epoch, 0).permutation(len(self.shards))

    def _random(self, purpose: int, *of: int) -> np.random.Generator:
        # The first word of the counter counts the draws.
        counter = np.array([0, purpose, *of], dtype=np.uint64)
        key = np.array([self.seed, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


class BlockCursor:
    """Finds the block of a lane that holds a row of the lane's stream.

    Attributes:
        number: of the block.
        shards: of the block.
        first: row of the stream with which it begins.
        rows: that it has.
    """

    def __init__(self, order: ShardOrder, lane: int):
        self._order, self._lane = order, lane
        self._enter(0, 0)

    def seek(self, row: int) -> None:
        """Go to the block of a row; a step costs next to nothing, far away one sum a block."""
        if row < self.first:
            self._enter(0, 0)
        while row >= self.first + self.rows:
            self._enter(self.number + 1, self.first + self.rows)

    def _enter(self, number: int, first: int) -> None:
        self.number, self.first = number, first
        self.shards = self._order.block(self._lane, number)
        self.rows = sum(self._order.rows[k] for k in self.shards)


def check_state(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another order than the one that a checkpoint was made with.

    Args:
        saved: `TrajectoryStream.state` of the checkpoint.
        identity: `TrajectoryStream.identity` of this run.

    Raises:
        ConfigError: with what differs.
    """
    differences = [
        f"{name}: {saved.get(name)} then, {value} now"
        for name, value in identity.items()
        if saved.get(name) != value
    ]
    if differences:
        raise ConfigError(
            f"the checkpoint was made with another order of the data ({'; '.join(differences)}); "
            "give the same settings, or start afresh"
        )

"""Batches of a trajectory set, read shard by shard as they are needed.

A worker reads its own lanes (ddray.distillation.order) and holds the shards of two blocks a lane at
most; a thread prepares the next batches. Noise is not read but drawn on the device from (seed,
index).

Shapes: B rows of this worker, L tokens, E code width.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.order import BlockCursor, ShardOrder, default_lanes
from ddray.distillation.reader import Arrivals, Lane, Shard, ShardReader
from ddray.errors import ConfigError
from ddray.method.conditioning import Condition
from ddray.method.seeding import standard_normal
from ddray.method.teacher import AskedFor, Teacher
from ddray.prefetch import Prefetch
from ddray.sets.conditions import Conditions, load_encoder
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.text.encoder import TextEncoder

# Batches that are prepared before they are asked for.
_DEPTH = 2
# Shards read at once where a run begins; later they come one by one, ahead of their use.
_READERS = 8


class Batch(NamedTuple):
    """Trajectories and what they were asked for by, on the device.

    Attributes:
        noise_BLE: float32, where they start.
        tokens_BL: int64, where they end.
        cond_B: class ids int64 [B], or captions.
        index_B: int64, their sample indices.
    """

    noise_BLE: Tensor
    tokens_BL: Tensor
    cond_B: Condition
    index_B: Tensor

    def split(self, parts: int) -> list["Batch"]:
        """Micro batches in their order, for the accumulation of gradients.

        Each has rows of consecutive lanes, or of one where there are few; the rows of a lane are
        shuffled over its block, so every micro batch mixes classes.

        Raises:
            ConfigError: if the parts would differ in size.
        """
        rows = len(self.index_B)
        if rows % parts:
            raise ConfigError(f"{rows} rows of a worker do not divide into {parts} micro batches")
        size = rows // parts
        return [
            Batch(self.noise_BLE[c], self.tokens_BL[c], self.cond_B[c], self.index_B[c])
            for c in (slice(first, first + size) for first in range(0, rows, size))
        ]


class _HostBatch(NamedTuple):
    """What a batch is made of, before it is on the device."""

    tokens_BL: Tensor
    index_B: Tensor
    asked_B: AskedFor


class TrajectoryStream:
    """The endless stream of a worker's batches; the batch of a step is a function of the step.

    In memory are the shards of at most two blocks in each of the worker's lanes, that is
    2 * lanes / world * buffer_shards shards, and the prepared batches. A set that is no larger than
    that is read once and kept.

    Attributes:
        most_shards: that bound.

    Args:
        trajectories: the set.
        batch_size: rows of a step over all workers, a multiple of `lanes`.
        seed: of the order.
        code_width: E.
        lanes: G; None = `default_lanes`. Another G is another order.
        buffer_shards: shards of a block; see `ShardOrder`.
        rank: of this worker.
        world: number of workers, which divides `lanes`.
        shards: those that are trained on; None = all.
        follow: wait for shards that are still to come; see `ShardOrder`.
        encode: text encoder of the plan, from `load_encoder`.
        condition: makes features and mask of captions what the network takes, as
            `Teacher.condition` does; for sets of captions.
        device: of the batches.
        poll_s: between two looks for a shard that is to come.
        stall_timeout_s: no new shard for so long is an error.

    Raises:
        ConfigError: if batch, lanes and workers do not divide, or under `follow` for some of the
            shards only.
        ShardError: if there is no shard to train on.
    """

    def __init__(
        self,
        trajectories: TrajectorySet,
        *,
        batch_size: int,
        seed: int,
        code_width: int,
        lanes: int | None = None,
        buffer_shards: int = 1,
        rank: int = 0,
        world: int = 1,
        shards: Sequence[int] | None = None,
        follow: bool = False,
        encode: TextEncoder | None = None,
        condition: Callable[[AskedFor], Condition] | None = None,
        device: torch.device | str = "cpu",
        poll_s: float = 2.0,
        stall_timeout_s: float = 600.0,
    ):
        plan = trajectories.plan
        lanes = default_lanes(batch_size, world) if lanes is None else lanes
        if follow and shards is not None:
            raise ConfigError("follow waits for every shard of the plan; leave out the list")
        self._order = ShardOrder(
            plan, shards=shards, seed=seed, lanes=lanes, buffer_shards=buffer_shards, follow=follow
        )
        _check_division(batch_size, lanes, world)
        self._batch_size, self._noise_seed = batch_size, plan.seed
        self._shape = (plan.num_tokens, code_width)
        # As a tensor has it: with its number, which a thread would take for 0.
        self._device = torch.empty(0, device=device).device
        self._condition = condition
        self._arrivals = Arrivals(trajectories, poll_s, stall_timeout_s) if follow else None
        self._mine = range(rank * lanes // world, (rank + 1) * lanes // world)
        self.most_shards = 2 * len(self._mine) * buffer_shards
        self._reader = ShardReader(
            trajectories, encode, len(self._order.shards) <= self.most_shards, self._arrivals
        )
        self._lanes: list[Lane] = []
        self._cursors = [BlockCursor(self._order, lane) for lane in range(lanes)]
        self._prefetch: Prefetch[Any] | None = None

    @property
    def ready(self) -> bool:
        """Whether the next batch, or what went wrong with it, is there without waiting."""
        return self._prefetch is not None and self._prefetch.ready

    @property
    def waiting(self) -> str | None:
        """What the stream waits for under `follow`, in words; None while it does not."""
        return None if self._arrivals is None else self._arrivals.waiting

    @property
    def rows_in_memory(self) -> int:
        """Rows of all shards that are held."""
        return self._reader.rows

    def identity(self) -> dict[str, Any]:
        """What the batches are a function of, beside the step; for `check_state`."""
        return {"batch_size": self._batch_size, **self._order.identity()}

    def state(self, step: int) -> dict[str, Any]:
        """The cursor before a step, as JSON values; the places of the lanes are for readers."""
        row = step * self._rows_a_lane
        for cursor in self._cursors:
            cursor.seek(row)
        return {
            **self.identity(),
            "step": step,
            "block": [cursor.number for cursor in self._cursors],
            "offset": [row - cursor.first for cursor in self._cursors],
        }

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This worker's batches of step `start` and all later ones; ends earlier such iterators.

        Raises:
            ShardError: naming a shard that is missing, damaged, or did not come.
            StorageError: if a shard cannot be read.
        """
        self._end_prefetch()
        self._lanes = [Lane(self._order, lane, self._reader) for lane in self._mine]
        self._prefetch = Prefetch(self._prepared(start), _DEPTH)
        # On a GPU, the noise is drawn by whoever trains, in the order of its stream.
        return map(self._complete, self._prefetch) if self._on_gpu else self._prefetch

    def close(self) -> None:
        """End the thread, also one that waits for a shard."""
        if self._arrivals is not None:
            self._arrivals.close()
        self._end_prefetch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _rows_a_lane(self) -> int:
        return self._batch_size // self._order.lanes

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _end_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _prepared(self, start: int) -> Iterator[Any]:
        """What the thread makes: batches, on a GPU the host's half of them."""
        if self._on_gpu:
            # Of this thread: it begins with the first GPU, and pinning would open a context there.
            torch.cuda.set_device(self._device)
        held = self._read_at_once(start)
        batch = self._gather(start)
        # The lanes have taken what they need of these.
        del held
        for step in count(start + 1):
            yield batch if self._on_gpu else self._complete(batch)
            for number, lane in enumerate(self._lanes, 1):
                lane.read_ahead(step * self._rows_a_lane, number / len(self._lanes))
            batch = self._gather(step)

    def _read_at_once(self, step: int) -> list[Shard]:
        """The shards that a first batch needs: they stay as long as somebody holds them."""
        row = step * self._rows_a_lane
        needed = sorted({k for lane in self._lanes for k in lane.shards_at(row)})
        if not all(map(self._reader.is_there, needed)):
            return []
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(self._reader.read, needed))

    def _gather(self, step: int) -> _HostBatch:
        amount = self._rows_a_lane
        picked = [pick for lane in self._lanes for pick in lane.take(step * amount, amount)]
        tokens = np.empty((len(picked), self._shape[0]), dtype=np.int64)
        for slot, (shard, row) in enumerate(picked):
            tokens[slot] = shard.tokens[row]
        index = np.array([shard.index[row] for shard, row in picked])
        asked = _chosen(picked).of(range(len(picked)))
        return _HostBatch(
            self._pinned(torch.from_numpy(tokens)),
            self._pinned(torch.from_numpy(index)),
            self._pinned(asked) if isinstance(asked, Tensor) else asked,
        )

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self._on_gpu else values

    def _complete(self, rows: _HostBatch) -> Batch:
        """A batch on the device, with its noise."""
        tokens_BL, index_B = (
            values.to(self._device, non_blocking=True) for values in (rows.tokens_BL, rows.index_B)
        )
        if self._condition is not None:
            cond_B = self._condition(rows.asked_B)
        else:
            assert isinstance(rows.asked_B, Tensor)
            cond_B = rows.asked_B.to(self._device, non_blocking=True)
        noise_BLE = standard_normal(self._noise_seed, index_B, self._shape)
        return Batch(noise_BLE, tokens_BL, cond_B, index_B)


def _chosen(picked: Sequence[tuple[Shard, int]]) -> Conditions:
    """Conditions of rows of several shards, as those of one."""
    first = picked[0][0].conditions
    label: Any = [shard.conditions.label[row] for shard, row in picked]
    label = np.array(label, dtype=first.label.dtype)
    if first.features is None:
        return Conditions(label, encode=first.encode)
    features = [(shard.conditions.features or ())[row] for shard, row in picked]
    return Conditions(label, features)


def _check_division(batch_size: int, lanes: int, world: int) -> None:
    if batch_size % lanes:
        raise ConfigError(f"batch_size={batch_size} must be a multiple of lanes={lanes}")
    if lanes % world:
        usable = [workers for workers in range(1, lanes + 1) if lanes % workers == 0]
        raise ConfigError(
            f"workers={world} must divide lanes={lanes}, in which the run reads its data: take one "
            f"of {', '.join(map(str, usable))} workers, or start afresh with other lanes"
        )


def open_stream(
    trajectories: TrajectorySet,
    teacher: Teacher,
    config: DistillConfig,
    *,
    lanes: int | None = None,
    shards: list[int] | None = None,
    rank: int = 0,
    world: int = 1,
) -> TrajectoryStream:
    """A worker's batches of a run, conditions as the teacher takes them.

    Args:
        trajectories: the set.
        teacher: that made it, on the device of the batches.
        config: of the run.
        lanes: as `TrajectoryStream`.
        shards: as `TrajectoryStream`.
        rank: of the worker.
        world: number of workers.
    """
    text = trajectories.plan.conditioning == "text"
    return TrajectoryStream(
        trajectories,
        batch_size=config.batch_size,
        seed=config.seed,
        code_width=teacher.codebook.shape[1],
        lanes=lanes,
        buffer_shards=config.buffer_shards,
        rank=rank,
        world=world,
        shards=shards,
        follow=config.follow,
        encode=load_encoder(trajectories.plan, teacher) if text else None,
        condition=teacher.condition if text else None,
        device=teacher.device,
        stall_timeout_s=config.stall_timeout_s,
    )

"""Trajectory sets, format 1: a plan and its shards of noise indices and tokens.

Noise is not stored: it is a function of (seed, index). Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ddray.errors import ShardError
from ddray.sets.parquet import num_rows
from ddray.sets.sharded_set import ShardedSet
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.shard import Rows, check_rows, decode, encode


class TrajectorySet(ShardedSet[TrajectoryPlan, Rows]):
    """A set of trajectories; rows are index [N], label [N] and tokens [N, L].

    Index is int64, label int32 (or an object array of captions), tokens uint16 or uint32.
    """

    PLAN = TrajectoryPlan
    # No Parquet file is shorter: two magic numbers and the length of the footer.
    LEAST_BYTES: ClassVar[int] = 12

    def write_shard(
        self, k: int, index: npt.ArrayLike, label: npt.ArrayLike, tokens: npt.ArrayLike
    ) -> None:
        """Check the rows of shard `k` and commit them, replacing a shard that is there.

        Args:
            k: Which shard.
            index: Integers [N], exactly `plan.shard_range(k)`.
            label: Integers [N] in [0, num_classes), or N captions if the teacher takes text.
            tokens: Integers [N, L] in [0, vocab_size).

        Raises:
            ShardError: If the rows are not those of the plan.
            StorageError: If the shard cannot be written; none is left behind then.
        """
        rows = np.asarray(index), np.asarray(label), np.asarray(tokens)
        try:
            check_rows(self.plan, k, *rows)
        except ShardError as exc:
            raise ShardError(f"shard {k} not written: {exc}") from exc
        self.storage.write(self.shard_name(k), encode(self.plan, k, *rows))

    def rows(self, start: int, stop: int) -> Rows:
        """Return the verified rows of indices [start, stop) from all shards they lie in.

        Raises:
            ShardError: If the range is not within the set, or a shard is missing or damaged.
            StorageError: If a shard cannot be read.
        """
        if not 0 <= start < stop <= self.plan.count:
            raise ShardError(
                f"rows [{start}, {stop}) are not within [0, {self.plan.count}) of {self.uri}"
            )
        parts = []
        for k in range(start // self.plan.shard_rows, (stop - 1) // self.plan.shard_rows + 1):
            first = self.plan.shard_range(k).start
            cut = slice(max(start - first, 0), stop - first)
            parts.append([column[cut] for column in self.read_shard(k)])
        index, label, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
        return index, label, tokens

    def _num_rows(self, k: int, data: bytes) -> int | None:
        return num_rows(data)

    def _decode(self, k: int, data: bytes) -> Rows:
        return decode(self.plan, k, data)

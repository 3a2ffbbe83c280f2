"""Trajectories at scale: a plan, a pool of teachers, shards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ddray import __version__
from ddray.config.base import PoolConfig, reserved_device
from ddray.config.sampling import SampleConfig
from ddray.models.zoo import load_teacher
from ddray.runtime.pools.device import SHARDS_AT_ONCE, Device
from ddray.runtime.pools.pool import Crew, fill, tell_found
from ddray.sets.captions import left_out
from ddray.sets.conditions import load_timed_encoder, open_captions, read_conditions
from ddray.sets.makers import MakersOfSet, kinds_of, maker_on
from ddray.sets.making import create_set
from ddray.sets.trajectories.making import make_plan, planned_teacher, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.run_folder import SUMMARY_FILE, write_json


class TrajectoryWorker:
    """An actor's teacher, which samples the next shard while the last one is written.

    Args:
        uri: of the trajectory set.
        device: "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        self._set = TrajectorySet.open(uri)
        plan = self._set.plan
        self._device = Device(plan.threads)
        self._teacher = self._device.load(lambda: planned_teacher(plan, device))
        self.maker = maker_on(self._teacher.device)
        self._encode = self._device.load(lambda: load_timed_encoder(plan, self._teacher))

    @property
    def encoding_s(self) -> float:
        """Time that went into features of captions so far."""
        return self._encode.seconds if self._encode else 0.0

    def do(self, shard: int) -> int:
        """Sample and write one shard."""
        plan = self._set.plan
        conditions = read_conditions(self._set, [shard], self._encode)
        index = np.asarray(plan.shard_range(shard))

        def tokens(rows: range) -> npt.NDArray[np.unsignedinteger]:
            asked = conditions.of(np.asarray(rows) - index[0])
            return sample_rows(self._teacher, plan, rows, asked).astype(plan.token_dtype)

        batches = [*self._device.batches(tokens, plan.batches(shard))]
        self._set.write_shard(shard, index, conditions.label, np.concatenate(batches))
        return len(index)


def sample(config: SampleConfig) -> dict[str, Any]:
    """Fill a trajectory set: plan, refuse what cannot work, sample what is missing, prove it whole.

    Args:
        config: the job.

    Returns:
        Summary: what is there, what was made, and how fast.

    Raises:
        ConfigError: another plan at the URI, or settings or captions that do not fit.
        StorageError: the URI cannot be written, or the captions not read.
        ClusterError: Ray cannot start, or the pool keeps failing.
        ShardError: shards are missing although the pool finished.
    """
    open_storage(config.out).check_writable()
    teacher = load_teacher(config.teacher, device="cpu", dtype=config.dtype)
    captions = open_captions(config, teacher)
    plan = make_plan(config, teacher, captions)
    trajectories = create_set(TrajectorySet, config, plan, teacher, captions)
    return _fill(trajectories, config, left_out(captions))


def refill(uri: str, pool: PoolConfig) -> dict[str, Any]:
    """Sample what an existing set lacks, by its own plan.

    Args:
        uri: of the set.
        pool: size of the pool; its `threads` give way to the plan's.

    Returns:
        The same summary as `sample`.

    Raises:
        ConfigError: the plan's teacher is not here.
        ShardError: there is no set, the teacher has other weights, or shards stay missing.
        StorageError: the URI cannot be written.
        ClusterError: Ray cannot start, or the pool keeps failing.
    """
    trajectories = TrajectorySet.open(uri)
    trajectories.storage.check_writable()
    planned_teacher(trajectories.plan, "cpu")
    return _fill(trajectories, pool.model_copy(update={"threads": trajectories.plan.threads}))


def _fill(
    trajectories: TrajectorySet, pool: PoolConfig, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make what is missing, and leave a summary, with what else is told of the set."""
    plan, storage = trajectories.plan, trajectories.storage
    missing = trajectories.missing()
    tell_found(plan, missing)
    found = plan.num_shards - len(missing)
    device = reserved_device(pool.num_gpus)
    devices, makers = kinds_of(storage) if found else [], MakersOfSet(storage, found > 0)
    # Of shards that nobody took note of, nothing is known, and this run cannot mend that.
    if missing and (devices or not found):
        devices = sorted({*devices, device})

    def note_devices() -> None:
        # Before the first shard: a run that is killed has made some too.
        write_json(storage, SUMMARY_FILE, {"devices": devices, "made_by": makers.known})

    crew = Crew(
        TrajectoryWorker,
        {"device": device},
        pool.threads,
        pool.num_gpus,
        pool.node_pool,
        [plan.teacher],
        SHARDS_AT_ONCE,
    )
    filled = fill("trajectories", trajectories, crew, pool, note_devices, makers.note)
    summary = {
        "uri": trajectories.uri,
        "ddray_version": __version__,
        "plan_hash": plan.hash,
        "teacher": plan.teacher,
        "rows": plan.count,
        **(told or {}),
        "devices": devices,
        "made_by": makers.known,
        **filled.summary(),
    }
    # A rerun that finds all there does not take the place of the one that made it.
    if missing or not storage.exists(SUMMARY_FILE):
        write_json(storage, SUMMARY_FILE, summary)
    return summary

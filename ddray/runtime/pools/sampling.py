"""Trajectories at scale: a plan, a pool of teachers, shards."""

import sys
from typing import Any

import numpy as np
import torch

from ddray import __version__
from ddray.config.base import PoolConfig
from ddray.config.sampling import SampleConfig
from ddray.models.zoo import load_teacher
from ddray.runtime.pools.pool import Crew, fill
from ddray.sets.captions import cut_captions
from ddray.sets.conditions import check_encoder, load_encoder, open_captions, read_conditions
from ddray.sets.trajectories.making import made_on, make_plan, planned_teacher, sample_rows
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.run_folder import CONFIG_FILE, SUMMARY_FILE, write_json


class TrajectoryWorker:
    """An actor's teacher, which writes whole shards.

    Args:
        uri: of the trajectory set.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        self._set = TrajectorySet.open(uri)
        torch.set_num_threads(self._set.plan.threads)
        self._teacher = planned_teacher(self._set.plan, device)
        self._encode = load_encoder(self._set.plan, self._teacher)

    def do(self, shard: int) -> int:
        """Sample and write one shard."""
        plan = self._set.plan
        conditions = read_conditions(self._set, [shard], self._encode)
        index = np.asarray(plan.shard_range(shard))
        tokens = [
            sample_rows(self._teacher, plan, rows, conditions.of(np.asarray(rows) - index[0]))
            for rows in plan.batches(shard)
        ]
        self._set.write_shard(
            shard, index, conditions.label, np.concatenate(tokens).astype(plan.token_dtype)
        )
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
    storage = open_storage(config.out)
    storage.check_writable()
    teacher = load_teacher(config.teacher, device="cpu", dtype=config.dtype)
    captions = open_captions(config, teacher)
    plan = make_plan(config, teacher, captions)
    if captions is not None:
        check_encoder(plan, teacher)
        captions.check(plan.count)
        # Before the set is made or grows: captions that are refused leave it as it was.
        cut_captions(captions, storage, TrajectorySet.planned(config.out, plan))
    trajectories = TrajectorySet.create(config.out, plan)
    write_json(storage, CONFIG_FILE, config.model_dump(mode="json"))
    return _fill(trajectories, config)


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


def _fill(trajectories: TrajectorySet, pool: PoolConfig) -> dict[str, Any]:
    """Say what is there, make the rest, and leave a summary."""
    plan, storage = trajectories.plan, trajectories.storage
    missing = trajectories.missing()
    found = plan.num_shards - len(missing)
    if found:
        rows = plan.count - sum(len(plan.shard_range(k)) for k in missing)
        print(
            f"found {found} of {plan.num_shards} shards ({rows} of {plan.count} rows); "
            f"{len(missing) or 'nothing'} to make",
            file=sys.stderr,
            flush=True,
        )
    device = "cuda" if pool.num_gpus else "cpu"
    devices = made_on(storage) if found else []
    # Of shards that nobody took note of, nothing is known, and this run cannot mend that.
    if missing and (devices or not found):
        devices = sorted({*devices, device})

    def note_devices() -> None:
        # Before the first shard: a run that is killed has made some too.
        write_json(storage, SUMMARY_FILE, {"devices": devices})

    crew = Crew(
        TrajectoryWorker,
        {"device": device},
        pool.threads,
        pool.num_gpus,
        pool.node_pool,
        [plan.teacher],
    )
    filled = fill("trajectories", trajectories, crew, pool, note_devices)
    summary = {
        "uri": trajectories.uri,
        "ddray_version": __version__,
        "plan_hash": plan.hash,
        "teacher": plan.teacher,
        "rows": plan.count,
        "devices": devices,
        **filled.summary(),
    }
    # A rerun that finds all there does not take the place of the one that made it.
    if missing or not storage.exists(SUMMARY_FILE):
        write_json(storage, SUMMARY_FILE, summary)
    return summary

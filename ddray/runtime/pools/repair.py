"""Mending a set of either kind: what is damaged is moved aside, and the gaps are filled."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ddray.config.base import PoolConfig
from ddray.runtime.cluster.capacity import require
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.doctor import preflight
from ddray.runtime.cluster.machine import Probe
from ddray.runtime.pools import bulk, sampling
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import planned_student
from ddray.sets.inspection import open_set, quarantine, verified
from ddray.sets.sharded_set import MANIFEST
from ddray.sets.trajectories.making import planned_teacher
from ddray.sets.trajectories.trajectory_set import TrajectorySet


def repair(uri: str, pool: PoolConfig) -> list[str]:
    """Move what is damaged or does not belong to quarantine/, and refill the gaps.

    Nothing is touched before it is sure that the gaps can be filled: that the plan's model is here,
    and a cluster with room for the pool, on whose nodes it is too.

    Args:
        uri: of the set. No other job may write to it meanwhile.
        pool: its size; its `threads` give way to the plan's.

    Returns:
        What was done, a line each.

    Raises:
        ConfigError: the plan's model is not here.
        ShardError: there is no set, the model has other weights, or shards stay missing.
        StorageError: the URI cannot be written.
        ClusterError: Ray cannot start, has too little, or the pool keeps failing.
    """
    opened = open_set(uri)
    report = verified(opened)
    lacking = opened.lacking()
    if report.ok and not lacking:
        return ["nothing to mend"]
    opened.storage.check_writable()
    gaps = len(report.missing) + len(report.damaged)
    if not gaps and not lacking:
        return quarantine(opened, report)
    if isinstance(opened, ImageSet):
        planned_student(opened.plan, "cpu")
        model, fill = opened.plan.student, bulk.refill
    else:
        assert isinstance(opened, TrajectorySet)
        planned_teacher(opened.plan, "cpu")
        model, fill = opened.plan.teacher, sampling.refill
    # What is made of all shards needs no pool.
    with _room_for(opened, model, gaps, pool) if gaps else nullcontext():
        lines = quarantine(opened, report)
        made = fill(uri, pool)
    lines.append(f"refilled {made['shards_made']} shards ({made['rows_made']} rows)")
    return lines + [f"wrote {name}" for name in lacking]


@contextmanager
def _room_for(
    opened: TrajectorySet | ImageSet, model: str, gaps: int, pool: PoolConfig
) -> Iterator[None]:
    """Within, Ray is there, and has what filling the gaps takes."""
    threads, least = opened.plan.threads, min(pool.workers[0], gaps)
    with connect():
        require("repair", least, threads, pool.num_gpus, pool.wait_s, pool.node_pool)
        probes = [Probe(opened.storage.uri, MANIFEST)]
        preflight(threads, pool.num_gpus, pool.node_pool, [model], probes)
        yield

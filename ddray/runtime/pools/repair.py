"""Mending a set of either kind: what is damaged is moved aside, and the gaps are filled."""

from ddray.config.base import PoolConfig
from ddray.runtime.pools import bulk, sampling
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import planned_student
from ddray.sets.inspection import open_set, quarantine, verified
from ddray.sets.trajectories.making import planned_teacher
from ddray.sets.trajectories.trajectory_set import TrajectorySet


def repair(uri: str, pool: PoolConfig) -> list[str]:
    """Move what is damaged or does not belong to quarantine/, and refill the gaps.

    Nothing is touched before it is sure that the plan's model is here.

    Args:
        uri: of the set. No other job may write to it meanwhile.
        pool: its size; its `threads` give way to the plan's.

    Returns:
        What was done, a line each.

    Raises:
        ConfigError: the plan's model is not here.
        ShardError: there is no set, the model has other weights, or shards stay missing.
        StorageError: the URI cannot be written.
        ClusterError: Ray cannot start, or the pool keeps failing.
    """
    opened = open_set(uri)
    report = verified(opened)
    lacking = opened.lacking()
    if report.ok and not lacking:
        return ["nothing to mend"]
    opened.storage.check_writable()
    gaps = bool(report.missing or report.damaged or lacking)
    if gaps and isinstance(opened, TrajectorySet):
        planned_teacher(opened.plan, "cpu")
    elif gaps and isinstance(opened, ImageSet):
        planned_student(opened.plan, "cpu")
    lines = quarantine(opened, report)
    if gaps:
        made = (bulk if isinstance(opened, ImageSet) else sampling).refill(uri, pool)
        lines.append(f"refilled {made['shards_made']} shards ({made['rows_made']} rows)")
    lines += [f"wrote {name}" for name in lacking]
    return lines

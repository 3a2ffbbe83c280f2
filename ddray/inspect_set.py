"""Looking at a trajectory set: what it holds, whether it is whole, mending it.

Imports ddray.shards.
"""

from typing import Any

from ddray.shards import TrajectorySet, shard_name


def describe(uri: str) -> dict[str, Any]:
    """Plan, progress and size of a set, as JSON values.

    Raises:
        ShardError: if there is no set.
    """
    trajectories = TrajectorySet.open(uri)
    plan, missing = trajectories.plan, trajectories.missing()
    sizes = trajectories.storage.list("shards")
    rows = sum(len(plan.shard_range(k)) for k in range(plan.num_shards) if k not in set(missing))
    return {
        "uri": trajectories.uri,
        "teacher": plan.teacher,
        "plan_hash": plan.hash,
        "seed": plan.seed,
        "cfg": plan.cfg,
        "solver": plan.solver,
        "num_evals": plan.num_evals,
        "rows": rows,
        "rows_planned": plan.count,
        "shards": plan.num_shards - len(missing),
        "shards_planned": plan.num_shards,
        "bytes": sum(sizes.values()),
        "bytes_per_row": round(sum(sizes.values()) / rows, 1) if rows else None,
    }


def verify(uri: str) -> list[str]:
    """Read every shard; what is wrong, a line each."""
    report = TrajectorySet.open(uri).verify()
    return [
        *(f"missing: {shard_name(k)}" for k in report.missing),
        *(f"damaged: {shard_name(k)}: {reason}" for k, reason in report.damaged.items()),
        *(f"does not belong: {name}" for name in report.unexpected),
    ]


def repair(uri: str) -> list[str]:
    """Move damaged shards aside; what was done, a line each."""
    trajectories = TrajectorySet.open(uri)
    moved = [
        f"{shard_name(k)} moved to {trajectories.quarantine(k)}"
        for k in trajectories.verify().damaged
    ]
    missing = len(trajectories.missing())
    end = f"{missing} shards to fill: run `ddray sample` with the same settings"
    return [*moved, end if missing else "nothing to mend"]

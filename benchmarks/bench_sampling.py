"""Trajectories through Ray against the same work in a bare loop, and two actors against one.

    python benchmarks/bench_sampling.py [--rows 2000] [--repeats 3] [--json FILE]

All of it samples and writes the same shards with one thread each, in processes with the same
settings of the allocator. The rates leave out what comes before the work (Ray's start, loading
the model); the time to the first shard stands in its own column. What is compared runs in turns,
as the speed of a machine drifts; the figures are medians.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import frame
import torch

import ddray
from ddray.config.sampling import SampleConfig
from ddray.runtime.pools.sampling import TrajectoryWorker, sample
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet

COLUMNS = frame.pool_columns("rows", "actors")


def bare_loop(config: SampleConfig) -> dict[str, float]:
    """Every shard in one process without Ray, one after the other."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    teacher = ddray.load_teacher(config.teacher, device="cpu")
    shards = TrajectorySet.create(config.out, make_plan(config, teacher))
    worker = TrajectoryWorker(shards.uri, "cpu")
    ends, ready = [], time.perf_counter()
    for shard in range(shards.plan.num_shards):
        worker.do(shard)
        ends.append(time.perf_counter())
    return frame.shard_rates(ends, start, ready, shards.plan.count)


def run(
    args: argparse.Namespace, actors: int, make: Callable[[SampleConfig], dict[str, Any]]
) -> dict[str, Any]:
    """All trajectories once."""
    with tempfile.TemporaryDirectory() as out:
        config = SampleConfig(
            teacher=args.teacher,
            out=out,
            count=args.rows,
            shard_rows=args.shard_rows,
            workers=(actors, actors),
        )
        return make(config)


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--teacher", default="digits-llamagen")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shard-rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    frame.same_allocator()
    where = frame.about("torch", "ray", note="one thread an actor")
    ways = {
        "bare loop": partial(run, args, 1, partial(frame.in_own_process, bare_loop)),
        "one actor": partial(run, args, 1, sample),
        "two actors": partial(run, args, 2, sample),
    }
    rows = frame.medians(frame.in_turns(ways, args.repeats), COLUMNS)
    frame.add_ratio(rows)
    result = {
        "teacher": args.teacher,
        "rows": args.rows,
        **where,
        "table": rows,
        "two_actors_to_one": rows[2]["rows_per_s"] / rows[1]["rows_per_s"],
    }
    frame.tell(result, f"{args.rows} trajectories of {args.teacher}", (rows, COLUMNS))
    print(f"two actors to one: {result['two_actors_to_one']:.3f}")
    frame.write(args.json, result)


if __name__ == "__main__":
    main()

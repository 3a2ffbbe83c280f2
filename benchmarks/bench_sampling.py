"""Trajectories through Ray against the same work in a bare loop, and two actors against one.

    python benchmarks/bench_sampling.py [--rows 2000] [--repeats 3] [--json FILE]

All of it samples and writes the same shards with one thread each, in processes with the same
settings of the allocator. The rates leave out what comes before the first shard (Ray's start,
loading the model), which stands in its own column. What is
compared runs in turns, as the speed of a machine drifts; the figures are medians.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch

import ddray
from ddray.config.sampling import SampleConfig
from ddray.report.table import Column, markdown_table
from ddray.runtime.cluster.connection import KEEP_FREED_MEMORY
from ddray.runtime.pools.sampling import TrajectoryWorker, sample
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet

COLUMNS = (
    Column("what", "what"),
    Column("rows_per_s", "rate", "rows/s", ".1f"),
    Column("ratio", "x bare loop", "", ".3f"),
    Column("busy_share", "actors busy", "", ".3f"),
    Column("first_shard_s", "first shard", "s", ".1f"),
    Column("seconds", "whole run", "s", ".1f"),
)


def bare_loop(config: SampleConfig) -> dict[str, float]:
    """Every shard in one process without Ray, one after the other."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_bare_loop, config).result()


def _bare_loop(config: SampleConfig) -> dict[str, float]:
    start = time.perf_counter()
    torch.set_num_threads(1)
    teacher = ddray.load_teacher(config.teacher, device="cpu")
    shards = TrajectorySet.create(config.out, make_plan(config, teacher))
    worker = TrajectoryWorker(shards.uri, "cpu")
    ends = []
    for shard in range(shards.plan.num_shards):
        worker.do(shard)
        ends.append(time.perf_counter())
    rows = shards.plan.count - len(shards.plan.shard_range(0))
    return {
        "rows_per_s": rows / (ends[-1] - ends[0]),
        "first_shard_s": ends[0] - start,
        "seconds": ends[-1] - start,
    }


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="digits-llamagen")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shard-rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Read by a process when it starts: what `ddray sample` gives to its actors.
    os.environ.update(KEEP_FREED_MEMORY)
    ways: dict[str, tuple[int, Callable[[SampleConfig], dict[str, Any]]]] = {
        "bare loop": (1, bare_loop),
        "one actor": (1, sample),
        "two actors": (2, sample),
    }
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in ways}
    for _ in range(args.repeats):
        for what, (actors, run) in ways.items():
            with tempfile.TemporaryDirectory() as out:
                config = SampleConfig(
                    teacher=args.teacher,
                    out=out,
                    count=args.rows,
                    shard_rows=args.shard_rows,
                    workers=(actors, actors),
                )
                runs[what].append(run(config))
    rows = [
        {"what": what}
        | {
            column.key: statistics.median(run[column.key] for run in found)
            for column in COLUMNS
            if column.key in found[0]
        }
        for what, found in runs.items()
    ]
    for row in rows:
        row["ratio"] = row["rows_per_s"] / rows[0]["rows_per_s"]
    result = {
        "teacher": args.teacher,
        "rows": args.rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread an actor",
        "versions": {
            "ddray": ddray.__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "table": rows,
        "two_actors_to_one": rows[2]["rows_per_s"] / rows[1]["rows_per_s"],
    }
    print(f"{args.rows} trajectories of {args.teacher}, {result['machine']}, {result['date']}\n")
    print(markdown_table(rows, COLUMNS))
    print(f"\ntwo actors to one: {result['two_actors_to_one']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

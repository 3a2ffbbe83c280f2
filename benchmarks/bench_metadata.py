"""What the metadata of a large trajectory set costs, and what a row takes on disk.

    python benchmarks/bench_metadata.py [--shards 10000] [--json FILE]       (about half a minute)

Shards are real Parquet files of few short rows, on a local disk and in the page cache. They are
encoded as `TrajectorySet.write_shard` does, but written without flushing each to the disk, which is
timed apart. Memory is the growth of the process's peak since the begin: an upper bound of a step's.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import frame
import numpy as np
from random_plan import random_plan

from ddray.report.table import Column
from ddray.sets.inspection import describe
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.shard import encode
from ddray.sets.trajectories.trajectory_set import TrajectorySet

MOST_SECONDS, MOST_MEGABYTES, MOST_OF_TWO_BYTES = 30, 500, 1.15
# Shards that are committed with fsync and rename, to time that.
COMMITTED = 200
STEP_COLUMNS = (
    Column("step", "step"),
    Column("seconds", "time", "s", ".2f"),
    Column("memory_mb", "memory", "MB", ".0f"),
)
SIZE_COLUMNS = (
    Column("vocab_size", "V"),
    Column("tokens", "L"),
    Column("bytes_per_row", "a row", "bytes", ".1f"),
    Column("ratio", "to 2 bytes x L", "", ".3f"),
)


def random_tokens(plan: TrajectoryPlan, k: int) -> np.ndarray:
    shape = (len(plan.shard_range(k)), plan.num_tokens)
    return np.random.default_rng(k).integers(0, plan.vocab_size, shape)


def rows_of(plan: TrajectoryPlan, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.asarray(plan.shard_range(k))
    return index, plan.label(index), random_tokens(plan, k)


def write_unflushed(folder: str, plan: TrajectoryPlan, shards: Iterable[int]) -> None:
    """Write shards as they are committed, but flush none of them."""
    for k in shards:
        Path(folder, shard_name(k)).write_bytes(encode(plan, k, *rows_of(plan, k)))


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def steps(folder: str, shards: int) -> list[dict[str, Any]]:
    """Seconds and memory of everything that is done with metadata alone, and of verify."""
    plan = random_plan(4 * shards, 4, (16,), 4096)
    rows: list[dict[str, Any]] = []
    start_mb = peak_megabytes()

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        outcome = work()
        seconds = time.perf_counter() - start
        rows.append({"step": step, "seconds": seconds, "memory_mb": peak_megabytes() - start_mb})
        return outcome

    def make_plan() -> TrajectorySet:
        trajectories = TrajectorySet.create(folder, plan)
        assert len([plan.batches(k) for k in trajectories.missing()]) == shards
        return trajectories

    trajectories = timed("plan, and the batches of every shard", make_plan)
    before = time.perf_counter()
    for k in range(COMMITTED):
        trajectories.write_shard(k, *rows_of(plan, k))
    committed = (time.perf_counter() - before) / COMMITTED * 1e3
    gaps = list(range(COMMITTED, shards, 10))
    write_unflushed(folder, plan, sorted({*range(COMMITTED, shards)} - {*gaps}))
    assert timed("resume: find every tenth shard missing", trajectories.missing) == gaps
    write_unflushed(folder, plan, gaps)
    larger = TrajectorySet.create(folder, replace(plan, count=plan.count + 1))
    assert timed("resume of an extended set", larger.missing) == [shards]
    write_unflushed(folder, larger.plan, [shards])
    assert timed("verify", larger.verify).ok
    assert timed("describe", lambda: describe(folder))["rows"] == larger.plan.count
    print(f"{committed:.1f} ms to encode and commit a shard, flushed ({COMMITTED} shards)\n")
    return rows


def size(folder: str, tokens: int, vocab_size: int) -> dict[str, Any]:
    """Bytes of a row where every code is as likely, which is the worst case."""
    plan = random_plan(500, 500, (tokens,), vocab_size)
    trajectories = TrajectorySet.create(folder, plan)
    trajectories.write_shard(0, *rows_of(plan, 0))
    bytes_per_row = Path(folder, shard_name(0)).stat().st_size / 500
    return {
        "vocab_size": vocab_size,
        "tokens": tokens,
        "bytes_per_row": bytes_per_row,
        "ratio": bytes_per_row / 2 / tokens,
    }


def main() -> None:
    """Print the tables, write them as JSON if asked; exit status 1 if a bar is missed."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", help="where to write; default: the folder for temporary files")
    args = parser.parse_args()
    where = frame.about("pyarrow")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = {
            **where,
            "shards": args.shards,
            "bars": {
                "seconds": MOST_SECONDS,
                "memory_mb": MOST_MEGABYTES,
                "ratio": MOST_OF_TWO_BYTES,
            },
            "steps": steps(f"{folder}/many", args.shards),
            "sizes": [
                size(f"{folder}/llamagen", 256, 16384),
                size(f"{folder}/var", 680, 4096),
            ],
        }
    done, sizes = result["steps"], result["sizes"]
    figures = [
        frame.Figure("longest step, s", max(row["seconds"] for row in done), most=MOST_SECONDS),
        frame.Figure("memory, MB", max(row["memory_mb"] for row in done), most=MOST_MEGABYTES),
        frame.Figure("to 2 bytes x L", max(row["ratio"] for row in sizes), most=MOST_OF_TWO_BYTES),
    ]
    told = (done, STEP_COLUMNS), (sizes, SIZE_COLUMNS), frame.figures_table(figures)
    frame.tell(result, f"Metadata of {args.shards} shards", *told)
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()

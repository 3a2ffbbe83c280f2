"""Where a large pool meets its limits: actors that sleep in place of a teacher, on logical GPUs.

    python benchmarks/bench_cluster.py --gpus 64 --shards 640 --seconds 4 [--kill-every 5]

The pool, its driver, Ray and the storage are the real ones, and the shards are whole (random
tokens of the sizes of a published model); only the teacher is a pause, so many more actors fit a
machine than it has cores. `--kill-every` ends a random actor with SIGKILL now and then, as a
preemption does. Prints what the driver and Ray's own processes cost a shard, and the rate while all
actors work over the ideal one.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from typing import Any

import frame
import numpy as np
import psutil
import ray
from random_plan import random_plan

from ddray.config.base import PoolConfig
from ddray.report.table import Column
from ddray.runtime.pools.pool import Crew, fill
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.run_folder import EVENTS_FILE

# (stages, codebook size) of the published teachers.
MODELS = {
    "var-d16": (tuple(n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 4096),
    "llamagen-l-256": ((1,) * 256, 16384),
}
COLUMNS = (
    Column("gpus", "logical GPUs"),
    Column("seconds_a_shard", "a shard takes", "s", ".2f"),
    Column("shards", "shards"),
    Column("killed", "actors killed"),
    Column("retries", "retries"),
    Column("first_shard_s", "first shard", "s", ".1f"),
    Column("all_working_s", "all actors", "s", ".1f"),
    Column("shards_per_s", "rate", "shards/s", ".1f"),
    Column("efficiency", "x ideal rate", "", ".3f"),
    Column("driver_ms", "driver", "CPU ms/shard", ".1f"),
    Column("ray_ms", "GCS and raylet", "CPU ms/shard", ".1f"),
    Column("driver_mb", "driver grows", "MB", ".0f"),
    Column("store_mb", "object store", "MB", ".1f"),
)


class SleepingWorker:
    """Pauses in place of sampling, then writes a whole shard."""

    def __init__(self, uri: str, seconds: float):
        self._set, self._seconds = TrajectorySet.open(uri), seconds

    def do(self, shard: int) -> int:
        plan, generator = self._set.plan, np.random.default_rng(shard)
        time.sleep(self._seconds * generator.uniform(0.9, 1.1))
        index = np.asarray(plan.shard_range(shard))
        shape = (len(index), plan.num_tokens)
        tokens = generator.integers(plan.vocab_size, size=shape, dtype=plan.token_dtype)
        self._set.write_shard(shard, index, plan.label(index), tokens)
        return len(index)


class Watch(threading.Thread):
    """The object store's peak, and preemptions.

    Args:
        gpus: logical GPUs.
        kill_every: seconds between two SIGKILLs to random actors, from when all are up until the
            pool shrinks for lack of work; 0 = none.
    """

    def __init__(self, gpus: int, kill_every: float):
        super().__init__(daemon=True)
        self._gpus, self._kill_every, self._over = gpus, kill_every, threading.Event()
        self._next_kill = time.monotonic() + kill_every
        self.killed, self.store_bytes = 0, 0.0

    def run(self) -> None:
        total = ray.cluster_resources()["object_store_memory"]
        while not self._over.wait(0.5):
            left = ray.available_resources().get("object_store_memory", total)
            self.store_bytes = max(self.store_bytes, total - left)
            if self._kill_every and time.monotonic() > self._next_kill:
                self._kill()

    def _kill(self) -> None:
        actors = [p for p in _children() if "_Actor" in _title(p)]
        if len(actors) >= self._gpus * (0.9 if self.killed else 1):
            random.choice(actors).kill()
            self.killed += 1
        self._next_kill = time.monotonic() + self._kill_every

    def stop(self) -> None:
        self._over.set()
        self.join()


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def control_seconds() -> float:
    """CPU time so far of the global control store and the raylet."""
    used = 0.0
    for process in _children():
        if any(name in _title(process)[:400] for name in ("gcs_server", "raylet/raylet")):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def driver_seconds() -> float:
    """CPU time so far of this process."""
    times = psutil.Process().cpu_times()
    return times.user + times.system


def steady_rate(shards: TrajectorySet, gpus: int) -> tuple[float, float]:
    """Seconds until every actor had made a shard, and shards/s from then on.

    The last shards are left out: while they are made, some actors have nothing left to do.
    """
    lines = shards.storage.read(EVENTS_FILE).splitlines()
    events = [json.loads(line) for line in lines]
    made = sorted((event["time"], event["actor"]) for event in events if event["event"] == "shard")[
        :-gpus
    ]
    times, actors = zip(*made, strict=True)
    first = max(actors.index(actor) for actor in set(actors))
    rate = (len(times) - 1 - first) / (times[-1] - times[first])
    return times[first] - events[0]["time"], rate


def bench(args: argparse.Namespace, out: str) -> dict[str, Any]:
    """One run of the pool, as a row of the table."""
    count = args.shards * args.shard_rows
    shards = TrajectorySet.create(out, random_plan(count, args.shard_rows, *MODELS[args.model]))
    config = PoolConfig(workers=(args.gpus, args.gpus), num_gpus=1, max_retries=20)
    watch = Watch(args.gpus, args.kill_every)
    before = driver_seconds(), control_seconds(), psutil.Process().memory_info().rss
    watch.start()
    crew = Crew(SleepingWorker, {"seconds": args.seconds}, config.threads, config.num_gpus)
    filled = fill("simulated trajectories", shards, crew, config)
    watch.stop()
    report = shards.verify()
    assert report.ok and report.rows == shards.plan.count, report
    all_working_s, rate = steady_rate(shards, args.gpus)
    return {
        "gpus": args.gpus,
        "seconds_a_shard": args.seconds,
        "shards": args.shards,
        "killed": watch.killed,
        "retries": filled.retries,
        "first_shard_s": filled.first_shard_s,
        "all_working_s": all_working_s,
        "shards_per_s": rate,
        "efficiency": rate * args.seconds / args.gpus,
        "driver_ms": (driver_seconds() - before[0]) / args.shards * 1e3,
        "ray_ms": (control_seconds() - before[1]) / args.shards * 1e3,
        "driver_mb": (psutil.Process().memory_info().rss - before[2]) / 1e6,
        "store_mb": watch.store_bytes / 1e6,
    }


def main() -> None:
    """Print the row; append it to a JSON file if asked."""
    parser = frame.arguments(__doc__, json_help="file of rows, to which this one is added")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--shards", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=4.0, help="that an actor pauses a shard")
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds between two kills")
    parser.add_argument("--model", choices=[*MODELS], default="var-d16")
    parser.add_argument("--shard-rows", type=int, default=500)
    args = parser.parse_args()
    where = frame.about("ray")
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_worker_niceness"] = "disabled", "0"
    with (
        tempfile.TemporaryDirectory(prefix="ddr", dir="/tmp") as temp,
        tempfile.TemporaryDirectory() as out,
    ):
        ray.init(
            address="local",
            num_cpus=args.gpus + 2,
            num_gpus=args.gpus,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            logging_level="error",
            log_to_driver=False,
            _temp_dir=temp,
        )
        row = bench(args, out)
        ray.shutdown()
    row |= {"model": args.model, "shard_rows": args.shard_rows, **where}
    frame.tell(row, f"Actors that sleep, sizes of {args.model}", ([row], COLUMNS))
    earlier = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    frame.write(args.json, [*earlier, row])


if __name__ == "__main__":
    main()

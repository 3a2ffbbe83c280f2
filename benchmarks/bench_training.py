"""Distillation through Ray Train and DeepSpeed against a plain torch loop, two workers against one.

    python benchmarks/bench_training.py [--steps 120] [--rounds 2] [--json FILE]     (six minutes)

All of it trains the same student on the same set with one thread a worker, in processes with the
same settings of the allocator; tokens are random, as no time depends on them. What is compared runs
in turns, as the speed of a machine drifts. Two plain loops at once say what the second core adds
where nothing is exchanged. Two workers have as many rows each as one has, and once the same batch
between them, where each pays for all that a step costs beside its rows. Wall rates are medians over
the lines that a run logs, the first ones left out. Where other work shares the cores, rows per
second of the workers' own CPU time say more. The start is that of a run on a Ray that is there
already, files in the page cache.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import frame
import psutil
import torch
from bench_metadata import write_unflushed

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.optimization import (
    MovingAverage,
    batch_loss,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from ddray.distillation.order import default_lanes
from ddray.distillation.stream import TrajectoryStream
from ddray.method.schedule import default_schedule
from ddray.models.zoo import load_teacher, new_student
from ddray.report.table import Column
from ddray.runtime.cluster.connection import connect
from ddray.runtime.training.driver import distill, read_history
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.run_folder import EVENTS_FILE

LEAST_SHARE, LEAST_SPEEDUP, MOST_START_S = 0.95, 1.7, 25.0
BATCH, ROWS, SHARD_ROWS = 16, 2000, 100
LOG_EVERY = 10
# Lines of a run that are left out: caches fill, and threads start.
WARM_UP_LINES = 2
# The driver notes an event when it looks for one: so much too late at most.
DRIVER_LOOKS_S = 1.0
# How Ray calls the process of a worker.
WORKER = "ray::RayTrainWorker"

COLUMNS = (
    Column("what", "what"),
    Column("batch_size", "rows a step", "", ".0f"),
    Column("rows_per_s", "rate", "rows/s", ".1f"),
    Column("ratio", "x plain loop", "", ".3f"),
    Column("rows_per_cpu_s", "rows a CPU second", "", ".1f"),
    Column("cpu_ratio", "x plain loop", "", ".3f"),
)
START_PARTS = (
    Column("group_s", "group start: processes, imports of torch and ddray, gloo"),
    Column("loading_s", "set and teacher"),
    Column("engine_s", "student, DeepSpeed"),
    Column("step_s", "first batch and step"),
    Column("start_s", "all"),
)
START_COLUMNS = (
    Column("what", "one worker, from fit() to its first step"),
    Column("seconds", "time", "s", ".1f"),
)


class WorkerTime:
    """Watches the CPU time of the training workers that this process has started, all together."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: list[tuple[float, float]] = []

    def share(self, start: float, seconds: float) -> float:
        """CPU seconds a second in a stretch of time that starts at a Unix time."""
        inside = [seen for seen in self._seen if start <= seen[0] <= start + seconds]
        (first_at, first), (last_at, last) = inside[0], inside[-1]
        return (last - first) / (last_at - first_at)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.2):
            total, workers = 0.0, 0
            for process in me.children(recursive=True):
                try:
                    if process.name().startswith(WORKER[:15]) and WORKER in process.cmdline()[0]:
                        times = process.cpu_times()
                        total, workers = total + times.user + times.system, workers + 1
                except (psutil.Error, IndexError):
                    continue
            if workers:
                self._seen.append((time.time(), total))


def plain_loops(config: DistillConfig) -> dict[str, float]:
    """The same training without Ray and DeepSpeed, in as many processes as the job has workers.

    They know nothing of each other: what two do in the time of one is the most that two workers
    can do on this machine.
    """
    count = config.workers[1]
    each = config.model_copy(update={"batch_size": config.batch_size // count})
    found = frame.in_own_processes(_plain_loop, [each] * count)
    return {
        "rows_per_s": sum(run["rows_per_s"] for run in found),
        "rows_per_cpu_s": statistics.mean(run["rows_per_cpu_s"] for run in found),
    }


def _plain_loop(config: DistillConfig) -> dict[str, float]:
    torch.set_num_threads(config.threads)
    trajectories = TrajectorySet.open(config.data)
    teacher = load_teacher(trajectories.plan.teacher, device="cpu")
    torch.manual_seed(config.seed)
    network, _ = new_student(teacher)
    groups = parameter_groups(network, teacher.codebook, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)
    average = MovingAverage(network.parameters(), config.ema_decay)
    stream = TrajectoryStream(
        trajectories,
        batch_size=config.batch_size,
        seed=config.seed,
        code_width=teacher.codebook.shape[1],
        lanes=default_lanes(config.batch_size),
    )
    schedule = default_schedule(teacher.stages)
    walls, cpus = [time.perf_counter()], [time.process_time()]
    with stream:
        for step, batch in zip(range(config.steps), stream.batches(), strict=False):
            rate = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
            set_learning_rate(optimizer, rate)
            losses = batch_loss(
                network,
                batch,
                teacher.stages,
                teacher.codebook,
                first=step,
                schedule=schedule,
                logits_weight=config.logits_weight,
                code_weight=config.code_weight,
            )
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            average.update(network.parameters(), step)
            if (step + 1) % LOG_EVERY == 0:
                walls.append(time.perf_counter())
                cpus.append(time.process_time())
    rows = LOG_EVERY * config.batch_size
    warm = slice(WARM_UP_LINES, None)
    steady = len(walls) - 1 - WARM_UP_LINES
    return {
        "rows_per_s": _median_rate(walls[warm], rows),
        "rows_per_cpu_s": rows * steady / (cpus[-1] - cpus[WARM_UP_LINES]),
    }


def _median_rate(times: list[float], rows: int) -> float:
    return statistics.median(rows / (b - a) for a, b in zip(times, times[1:], strict=False))


def through_ray(config: DistillConfig) -> dict[str, float]:
    """The training of `ddray distill`, and what its start took."""
    with WorkerTime() as watched:
        distill(config)
    rates = [line["samples_per_s"] for line in read_history(config.out)]
    spent = [LOG_EVERY * config.batch_size / rate for rate in rates]
    events = [json.loads(line) for line in Path(config.out, EVENTS_FILE).read_text().splitlines()]
    times = {event["event"]: event for event in events}
    begun, first = times["started"], times["first step"]
    inside = {name: first[name] for name in ("loading_s", "engine_s", "step_s")}
    start_s = first["time"] - begun["time"]
    steady = sum(spent[WARM_UP_LINES:])
    share = watched.share(first["time"] + sum(spent[:WARM_UP_LINES]), steady - DRIVER_LOOKS_S)
    rows = LOG_EVERY * config.batch_size * (len(spent) - WARM_UP_LINES)
    return {
        "rows_per_s": statistics.median(rates[WARM_UP_LINES:]),
        "rows_per_cpu_s": rows / steady / share,
        "start_s": start_s,
        "group_s": start_s - sum(inside.values()),
        **inside,
    }


def write_set(folder: str, teacher: str) -> None:
    """A set of the teacher's plan with random tokens."""
    config = SampleConfig(teacher=teacher, out=folder, count=ROWS, shard_rows=SHARD_ROWS)
    plan = make_plan(config, load_teacher(teacher, device="cpu"))
    TrajectorySet.create(folder, plan)
    Path(folder, "shards").mkdir()
    write_unflushed(folder, plan, range(plan.num_shards))


def run(
    args: argparse.Namespace,
    data: str,
    workers: int,
    batch_size: int,
    train: Callable[[DistillConfig], dict[str, float]],
) -> dict[str, float]:
    """The training once."""
    with tempfile.TemporaryDirectory() as out:
        config = DistillConfig(
            data=data,
            out=out,
            steps=args.steps,
            batch_size=batch_size,
            workers=(workers, workers),
            threads=1,
            log_every=LOG_EVERY,
            checkpoint_every=args.steps,
        )
        found = {"batch_size": batch_size, **train(config)}
    told = f"{workers} x {train.__name__}, {batch_size} rows a step"
    print(f"{told}: {found['rows_per_s']:.1f} rows/s", flush=True)
    return found


def bench(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Figures of every run, in turns."""
    with tempfile.TemporaryDirectory() as data, connect():
        write_set(data, args.teacher)
        train = partial(run, args, data)
        ways = {
            "plain loop": partial(train, 1, BATCH, plain_loops),
            "two plain loops": partial(train, 2, 2 * BATCH, plain_loops),
            "one worker": partial(train, 1, BATCH, through_ray),
            "two workers": partial(train, 2, 2 * BATCH, through_ray),
            "two workers, the same batch": partial(train, 2, BATCH, through_ray),
        }
        return frame.in_turns(ways, args.rounds)


def tables(
    runs: dict[str, list[dict[str, float]]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Medians over the rounds: rates, and the start of one worker."""
    rates = frame.medians(runs, COLUMNS)
    frame.add_ratio(rates)
    frame.add_ratio(rates, "rows_per_cpu_s", "cpu_ratio")
    (one,) = frame.medians({"one worker": runs["one worker"]}, START_PARTS)
    return rates, [{"what": part.label, "seconds": one[part.key]} for part in START_PARTS]


def main() -> None:
    """Print the tables, write them as JSON if asked; exit status 1 if a bar is missed."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--teacher", default="digits-llamagen")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    frame.same_allocator()
    where = frame.about("torch", "ray", "deepspeed", note="one thread a worker")
    rates, start = tables(bench(args))
    loads = [where["load"], frame.load()]
    _, _, one, two, _ = rates
    figures = [
        frame.Figure("one_worker_to_plain_loop", one["ratio"], least=LEAST_SHARE),
        frame.Figure(
            "two_workers_to_one", two["rows_per_s"] / one["rows_per_s"], least=LEAST_SPEEDUP
        ),
        frame.Figure("start_s", start[-1]["seconds"], most=MOST_START_S),
    ]
    result = {
        "teacher": args.teacher,
        "steps": args.steps,
        "rounds": args.rounds,
        **where,
        "load": loads,
        "rates": rates,
        "start": start,
        "bars": {figure.what: {"measured": figure.value, "bar": figure.bar} for figure in figures},
    }
    told = (rates, COLUMNS), (start, START_COLUMNS), frame.figures_table(figures)
    frame.tell(result, f"Training with {args.teacher}", *told)
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()

"""The data path of distillation alone against what the training step consumes, in the same run.

    python benchmarks/bench_data.py [--json FILE]      (some minutes on one core, 8 GB of memory)

The data path is `TrajectoryStream` as the trainer has it, noise included, on one thread: it reads,
verifies and decodes shards of random tokens from the page cache. The set is larger than what a
stream keeps in memory. The step is a plain torch loop's: loss, gradients
and AdamW of the real student, in float32 on one thread; of VAR-d16 in its official size with random
weights. Both take turns, and the ratio is the median of the rounds.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import frame
import torch
from bench_metadata import write_unflushed
from bench_models import random_teacher
from random_plan import random_plan

import ddray
from ddray.distillation.optimization import batch_loss, parameter_groups, set_learning_rate
from ddray.distillation.stream import Batch, TrajectoryStream
from ddray.method.schedule import default_schedule
from ddray.method.teacher import Teacher
from ddray.models.zoo import new_student
from ddray.report.table import Column
from ddray.sets.trajectories.trajectory_set import TrajectorySet

BAR = 5.0
SHARD_ROWS, SHARDS = 500, 40
# 16 lanes, so that 2 x 16 shards may stay in memory: fewer than the set has.
DATA_BATCH = 16
COLUMNS = (
    Column("case", "student"),
    Column("data_rows_per_s", "data path", "rows/s", ".0f"),
    Column("step_rows_per_s", "step", "rows/s", ".2f"),
    Column("ratio", "ratio", "", ".1f"),
    Column("bytes_per_row", "a row", "bytes", ".0f"),
    Column("read_rows_per_s", "read and verify alone", "rows/s", ".0f"),
    Column("read_mb_per_s", "", "MB/s", ".1f"),
    Column("noise_rows_per_s", "noise alone", "rows/s", ".0f"),
    Column("host_rows_per_s", "without noise", "rows/s", ".0f"),
)


@dataclass(frozen=True)
class Case:
    """A student and how it is timed.

    Attributes:
        make_teacher: its teacher.
        batch: rows of a step.
        steps: that are timed in a round.
    """

    make_teacher: Callable[[], Teacher]
    batch: int
    steps: int


CASES = {
    "digits": Case(lambda: ddray.load_teacher("digits-llamagen", device="cpu"), 16, 8),
    "var-d16": Case(lambda: random_teacher("var-d16", "cpu", "float32"), 2, 1),
}


def written_set(folder: str, teacher: Teacher) -> TrajectorySet:
    """A set of the teacher's sizes with random tokens."""
    sizes = teacher.stages, len(teacher.codebook), teacher.num_classes
    trajectories = TrajectorySet.create(
        folder, random_plan(SHARDS * SHARD_ROWS, SHARD_ROWS, *sizes)
    )
    Path(folder, "shards").mkdir()
    write_unflushed(folder, trajectories.plan, range(SHARDS))
    return trajectories


def training_step(teacher: Teacher) -> Callable[[Batch], None]:
    """One step of a plain torch loop."""
    torch.manual_seed(0)
    network, _ = new_student(teacher)
    groups = parameter_groups(network, teacher.codebook, 0.01)
    optimizer = torch.optim.AdamW(groups, fused=True)
    set_learning_rate(optimizer, 1e-4)

    def step(batch: Batch) -> None:
        loss = batch_loss(
            network,
            batch,
            teacher.stages,
            teacher.codebook,
            first=0,
            schedule=default_schedule(teacher.stages),
            logits_weight=1.0,
            code_weight=0.1,
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()

    return step


def stream_of(trajectories: TrajectorySet, code_width: int) -> TrajectoryStream:
    return TrajectoryStream(trajectories, batch_size=DATA_BATCH, seed=0, code_width=code_width)


def parts_of_the_path(trajectories: TrajectorySet, teacher: Teacher) -> dict[str, float]:
    """What a row takes on disk, and the rates of parts of the path by themselves."""
    plan = trajectories.plan
    read_s = frame.seconds_of(trajectories.verify)
    index_B = torch.arange(DATA_BATCH)
    shape = (plan.num_tokens, teacher.codebook.shape[1])
    noise_s = min(frame.seconds_of(lambda: ddray.noise(0, index_B, shape)) for _ in range(20))
    # Noise of width 1 is next to none: what is left is what a CPU does for a GPU.
    with stream_of(trajectories, 1) as stream:
        host_s = frame.seconds_of(
            lambda: consume(islice(stream.batches(), plan.count // DATA_BATCH))
        )
    size = sum(trajectories.listing().sizes.values())
    return {
        "bytes_per_row": size / plan.count,
        "read_rows_per_s": plan.count / read_s,
        "read_mb_per_s": size / read_s / 1e6,
        "noise_rows_per_s": DATA_BATCH / noise_s,
        "host_rows_per_s": plan.count / host_s,
    }


def bench(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Rates of both sides, in turns: an epoch of the data is cut into as many parts as rounds."""
    teacher = case.make_teacher()
    step = training_step(teacher)
    with tempfile.TemporaryDirectory() as folder:
        trajectories = written_set(folder, teacher)
        parts = parts_of_the_path(trajectories, teacher)
        with stream_of(trajectories, teacher.codebook.shape[1]) as stream:
            assert stream.most_shards < SHARDS
            batches = stream.batches()
            first = Batch(*(part[: case.batch] for part in next(batches)))
            step(first)  # a warm-up
            amount = SHARDS * SHARD_ROWS // DATA_BATCH // rounds
            ways = {
                "data": partial(frame.seconds_of, lambda: consume(islice(batches, amount))),
                "step": partial(frame.seconds_of, lambda: repeat(step, first, case.steps)),
            }
            times = frame.in_turns(ways, rounds)
    data = [amount * DATA_BATCH / seconds for seconds in times["data"]]
    steps = [case.steps * case.batch / seconds for seconds in times["step"]]
    return {
        "case": name,
        "step_batch": case.batch,
        "data_batch": DATA_BATCH,
        "rounds": rounds,
        "data_rows_per_s": statistics.median(data),
        "step_rows_per_s": statistics.median(steps),
        "ratio": statistics.median(d / s for d, s in zip(data, steps, strict=True)),
        **parts,
    }


def consume(batches: Iterator[Batch]) -> None:
    for _ in batches:
        pass


def repeat(step: Callable[[Batch], None], batch: Batch, times: int) -> None:
    for _ in range(times):
        step(batch)


def main() -> None:
    """Print the table, write it as JSON if asked; exit status 1 if a bar is missed."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, nargs="*", default=[*CASES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = frame.about("torch", note="one thread")
    loads, rows = [where["load"]], []
    for name in args.case:
        rows.append(bench(name, CASES[name], args.rounds))
        loads.append(frame.load())
    result = {
        **where,
        "load": loads,
        "shards": SHARDS,
        "shard_rows": SHARD_ROWS,
        "bar": BAR,
        "rows": rows,
    }
    figures = [frame.Figure(f"{row['case']}, x step", row["ratio"], least=BAR) for row in rows]
    frame.tell(result, "The data path", (rows, COLUMNS), frame.figures_table(figures))
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()

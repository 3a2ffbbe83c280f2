"""What evaluating costs beside the work itself: a pool's rate, and memory that must not grow.

    python benchmarks/bench_evaluating.py [--json FILE.json]

A pool of one worker makes features of a student's images, writing them included, against a bare
loop of `generate`, `decode` and the feature network over the same images in the same batches, which
writes nothing; one thread each, in turns, as the speed of a machine drifts. The rates leave out
what comes before the work (the start of Ray, loading models); the figures are medians. Then, each
in a process of its own: FID of 50,000 rows of 2048 made-up features, and a `samples.npz` of as many
made-up images, by the growth of the peak of the process's memory.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import frame
import numpy as np
import torch
from frame import Figure

import ddray
from ddray.config.evaluation import EvaluateConfig
from ddray.evaluation.making import coloured, load_extractor
from ddray.evaluation.planning import Preparation
from ddray.metrics.frechet import FeatureStatistics, frechet_distance
from ddray.metrics.measurement import Measurement, ShardFeatures
from ddray.metrics.network import POOL
from ddray.metrics.pixels import eight_bit
from ddray.report.image_file import encode_png
from ddray.runtime.cluster.connection import connect
from ddray.runtime.evaluating import make_features
from ddray.sets.images.samples import write_samples
from ddray.storage import open_storage

BAR = 0.95
MEASURED_MB, WRITTEN_MB = 400, 300
IMAGES, SHARD, SIDE, WIDTH = 50_000, 500, 64, 2048
COLUMNS = frame.pool_columns("images", "workers")


def bare_loop(config: EvaluateConfig) -> dict[str, Any]:
    """All images in one process without Ray, one thing after the other, nothing written."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    plan = Preparation(config).plan
    (generator,) = (g for g in plan.generators if g.kind == "student")
    student = ddray.load_student(config.student, device="cpu")
    network = load_extractor(plan.extractors[0], "cpu")
    kept, ends, ready = [], [], time.perf_counter()
    for task in plan.tasks:
        for rows in plan.batches(task):
            index = torch.tensor(rows)
            labels = torch.from_numpy(plan.label(index.numpy()))
            codes = student.generate(labels, index=index, seed=plan.seed, **generator.settings)
            images = eight_bit(student.decode(codes))
            kept.append(network(coloured(images, network))[POOL].numpy())
        ends.append(time.perf_counter())
    assert sum(map(len, kept)) == plan.count
    return frame.shard_rates(ends, start, ready, plan.count)


def pool(config: EvaluateConfig) -> dict[str, Any]:
    """All images by a pool of one worker."""
    features = Preparation(config).begin()
    with connect():
        return make_features("evaluation", features, config)


def run(args: argparse.Namespace, make: Callable[[EvaluateConfig], dict[str, Any]]) -> Any:
    """All images once."""
    with tempfile.TemporaryDirectory() as out:
        config = EvaluateConfig(
            student=args.student,
            out=out,
            rows=("student",),
            schedules=("0",),
            count=args.rows,
            threads=1,
        )
        return make(config)


def peak_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measuring_mb(count: int) -> float:
    """What FID of made-up features adds to the memory of a process."""
    torch.set_num_threads(1)
    frechet_distance(np.zeros(9), np.eye(9), np.zeros(9), np.eye(9))
    before = peak_mb()
    real = FeatureStatistics(0, np.zeros(WIDTH), np.eye(WIDTH))
    reference = SimpleNamespace(statistics={POOL: real})
    measurement = Measurement(("fid",), count, cast(Any, reference))
    draws = np.random.default_rng(0)
    for first in range(0, count, SHARD):
        rows = draws.standard_normal((SHARD, WIDTH), np.float32)
        measurement.add(ShardFeatures(first, {POOL: rows}))
    assert measurement.results()["fid"] > 0
    return peak_mb() - before


def writing_mb(count: int) -> float:
    """What `samples.npz` of made-up shards adds to the memory of a process."""
    pixels = np.random.default_rng(0).integers(0, 256, (SHARD, SIDE, SIDE, 3), np.uint8)
    shard = SimpleNamespace(content=[encode_png(image, fast=True) for image in pixels])
    with tempfile.TemporaryDirectory() as out:
        images = SimpleNamespace(
            plan=SimpleNamespace(count=count, num_shards=count // SHARD),
            storage=open_storage(out),
            read_shard=lambda k: shard,
        )
        before = peak_mb()
        write_samples(cast(Any, images))
        return peak_mb() - before


def main() -> None:
    """Print the tables; write them as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--student", default="digits-llamagen-dd")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    frame.same_allocator()
    where = frame.about("torch", "ray", note="one thread a model")
    ways = {
        "bare loop": partial(run, args, partial(frame.in_own_process, bare_loop)),
        "pool of one worker": partial(run, args, pool),
    }
    rows = frame.medians(frame.in_turns(ways, args.repeats), COLUMNS)
    frame.add_ratio(rows)
    measured = frame.in_own_process(measuring_mb, IMAGES)
    written = frame.in_own_process(writing_mb, IMAGES)
    figures = [
        Figure("pool, x bare loop", rows[1]["ratio"], least=BAR),
        Figure(f"FID of {IMAGES} x {WIDTH} (MB)", measured, most=MEASURED_MB),
        Figure(f"npz of {IMAGES} x {SIDE} x {SIDE} x 3 (MB)", written, most=WRITTEN_MB),
    ]
    result = {
        **{"student": args.student, "rows": args.rows, **where, "table": rows},
        "figures": [figure.row() for figure in figures],
    }
    headline = f"{args.rows} images of {args.student}, features of the digit classifier"
    frame.tell(result, headline, (rows, COLUMNS), frame.figures_table(figures))
    frame.write(args.json, result)
    frame.stop_if_missed(figures)


if __name__ == "__main__":
    main()

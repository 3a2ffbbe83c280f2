"""Images in bulk by each engine against the same work in a bare loop, one thread each.

    python benchmarks/bench_bulk.py [--rows 4000] [--repeats 3] [--json FILE]

All of it makes the same shards, PNG encoding and Parquet writing included, in processes with the
same settings of the allocator; that they are the same bytes is checked. The bare loop does one
thing after the other: batch by batch the student, then the PNGs, then the shard. The rates leave
out what comes before the work (the start of Ray and Serve, loading the model); the time to the
first shard stands in its own column. What is compared runs in turns, as the speed of a machine
drifts; the figures are medians.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import frame
import numpy as np
import torch

import ddray
from ddray.config.generation import GenerateConfig
from ddray.report.image_file import encode_png
from ddray.report.pictures import to_uint8
from ddray.runtime.pools.bulk import generate
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import make_plan

BAR = 0.9
COLUMNS = frame.pool_columns("images", "workers")


def bare_loop(config: GenerateConfig) -> dict[str, Any]:
    """Every shard in one process without Ray, one thing after the other."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    student = ddray.load_student(config.student, device="cpu")
    images = ImageSet.create(config.out, make_plan(config, student))
    plan, ends, ready = images.plan, [], time.perf_counter()
    for k in range(plan.num_shards):
        files: list[bytes] = []
        for rows in plan.batches(k):
            index = np.arange(rows.start, rows.stop)
            labels, drawn = torch.from_numpy(plan.label(index)), torch.from_numpy(index)
            codes = student.generate(labels, index=drawn, seed=plan.seed, schedule=plan.schedule)
            pixels = to_uint8(student.decode(codes).numpy())
            files += [encode_png(image) for image in pixels]
        images.write_shard(k, plan.label(np.asarray(plan.shard_range(k))), files)
        ends.append(time.perf_counter())
    return frame.shard_rates(ends, start, ready, plan.count)


def _digest(out: str) -> str:
    shards = sorted(Path(out, "shards").iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in shards)).hexdigest()


def run(
    args: argparse.Namespace, engine: str, make: Callable[[GenerateConfig], dict[str, Any]]
) -> dict[str, Any]:
    """All images once, and the digest of their shards."""
    with tempfile.TemporaryDirectory() as out:
        config = GenerateConfig(
            student=args.student,
            out=out,
            count=args.rows,
            shard_rows=args.shard_rows,
            batch_size=args.batch_size,
            engine=engine,
            workers=(1, 1),
            threads=1,
        )
        return {**make(config), "digest": _digest(out)}


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = frame.arguments(__doc__)
    parser.add_argument("--student", default="digits-llamagen-dd")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--shard-rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    frame.same_allocator()
    where = frame.about("torch", "ray", note="one thread a model")
    ways = {
        "bare loop": partial(run, args, "data", partial(frame.in_own_process, bare_loop)),
        "engine serve, one replica": partial(run, args, "serve", generate),
        "engine data, one worker": partial(run, args, "data", generate),
    }
    found = frame.in_turns(ways, args.repeats)
    rows = frame.medians(found, COLUMNS)
    frame.add_ratio(rows)
    figures = [
        frame.Figure(f"{row['what']}, x bare loop", row["ratio"], least=BAR) for row in rows[1:]
    ]
    result = {
        "student": args.student,
        "rows": args.rows,
        "shard_rows": args.shard_rows,
        "batch_size": args.batch_size,
        **where,
        "table": rows,
        "same_bytes": len({once["digest"] for runs in found.values() for once in runs}) == 1,
        "bar": BAR,
        "met": not any(figure.missed for figure in figures),
    }
    headline = f"{args.rows} images of {args.student}"
    frame.tell(result, headline, (rows, COLUMNS), frame.figures_table(figures))
    print(f"same bytes: {result['same_bytes']}")
    frame.write(args.json, result)


if __name__ == "__main__":
    main()

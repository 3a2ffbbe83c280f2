"""Images in bulk by each engine against the same work in a bare loop, one thread each.

    python benchmarks/bench_bulk.py [--rows 4000] [--repeats 3] [--json FILE]

All of it makes the same shards, PNG encoding and Parquet writing included, in processes with the
same settings of the allocator; that they are the same bytes is checked. The bare loop does one
thing after the other: batch by batch the student, then the PNGs, then the shard. The rates leave
out what comes before the first shard (the start of Ray and Serve, loading the model), which stands
in its own column. What is compared runs in turns, as the speed of a machine drifts; the figures are
medians.
"""

import argparse
import hashlib
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

import numpy as np
import ray
import torch

import ddray
from ddray.config.generation import GenerateConfig
from ddray.report.image_file import encode_png
from ddray.report.pictures import to_uint8
from ddray.report.table import Column, markdown_table
from ddray.runtime.cluster.connection import KEEP_FREED_MEMORY
from ddray.runtime.pools.bulk import generate
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import make_plan

BAR = 0.9
COLUMNS = (
    Column("what", "what"),
    Column("rows_per_s", "rate", "images/s", ".1f"),
    Column("ratio", "x bare loop", "", ".3f"),
    Column("busy_share", "workers busy", "", ".3f"),
    Column("first_shard_s", "first shard", "s", ".1f"),
    Column("seconds", "whole run", "s", ".1f"),
)


def bare_loop(config: GenerateConfig) -> dict[str, Any]:
    """Every shard in one process without Ray, one thing after the other."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_bare_loop, config).result()


def _bare_loop(config: GenerateConfig) -> dict[str, Any]:
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    student = ddray.load_student(config.student, device="cpu")
    images = ImageSet.create(config.out, make_plan(config, student))
    plan, ends = images.plan, []
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
    return {
        "rows_per_s": (plan.count - len(plan.shard_range(0))) / (ends[-1] - ends[0]),
        "first_shard_s": ends[0] - start,
        "seconds": ends[-1] - start,
    }


def _digest(out: str) -> str:
    shards = sorted(Path(out, "shards").iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in shards)).hexdigest()


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="digits-llamagen-dd")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--shard-rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Read by a process when it starts: what `ddray generate` gives to its actors.
    os.environ.update(KEEP_FREED_MEMORY)
    ways: dict[str, tuple[str, Callable[[GenerateConfig], dict[str, Any]]]] = {
        "bare loop": ("data", bare_loop),
        "engine serve, one replica": ("serve", generate),
        "engine data, one worker": ("data", generate),
    }
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in ways}
    digests = set()
    for _ in range(args.repeats):
        for what, (engine, run) in ways.items():
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
                runs[what].append(run(config))
                digests.add(_digest(out))
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
        "student": args.student,
        "rows": args.rows,
        "shard_rows": args.shard_rows,
        "batch_size": args.batch_size,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a model",
        "versions": {
            "ddray": ddray.__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "table": rows,
        "same_bytes": len(digests) == 1,
        "bar": BAR,
        "met": all(row["ratio"] >= BAR for row in rows),
    }
    print(f"{args.rows} images of {args.student}, {result['machine']}, {result['date']}\n")
    print(markdown_table(rows, COLUMNS))
    for row in rows[1:]:
        print(f"\n{row['what']}: {row['ratio']:.3f} of the bare loop (bar: {BAR:g})")
    print(f"same bytes: {result['same_bytes']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What all benchmarks share: where they run, rounds in turns, tables of medians, a file of JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from ddray import __version__
from ddray.report.table import Column, markdown_table

T = TypeVar("T")

POOL_COLUMNS = (
    Column("what", "what"),
    Column("rows_per_s", "rate", "rows/s", ".1f"),
    Column("ratio", "x bare loop", "", ".3f"),
    Column("busy_share", "workers busy", "", ".3f"),
    Column("first_shard_s", "first shard", "s", ".1f"),
    Column("seconds", "whole run", "s", ".1f"),
)
"""Of a comparison of pools with a bare loop, which comes first."""


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark can be told; its help is the file's own docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    return parser


def about(*packages: str, device: str = "cpu", note: str = "") -> dict[str, Any]:
    """Where and when: machine, its load, versions of ddray and some packages, date.

    Args:
        packages: whose versions matter, beside ddray's.
        device: that computes, "cpu" or "cuda".
        note: on the machine, such as how many threads are used.
    """
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    return {
        "machine": f"{machine}, {note}" if note else machine,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"ddray": __version__} | {name: version(name) for name in packages},
    }


def same_allocator() -> None:
    """Give processes that start from here what ddray gives to its workers."""
    # Not at the head of the file: some benchmarks run where there is no Ray.
    from ddray.runtime.cluster.connection import KEEP_FREED_MEMORY

    os.environ.update(KEEP_FREED_MEMORY)


def in_own_process(work: Callable[..., T], *given: Any) -> T:
    """Work in a new process: a bare loop, which shares nothing with Ray's driver."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(work, *given).result()


def in_turns(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Results of all ways, each round by round: the speed of a machine drifts."""
    found: dict[str, list[T]] = {what: [] for what in ways}
    for _ in range(rounds):
        for what, work in ways.items():
            found[what].append(work())
    return found


def medians(
    found: Mapping[str, Sequence[Mapping[str, Any]]], columns: Iterable[Column]
) -> list[dict[str, Any]]:
    """A row for each way: of every figure that it has, the median of its rounds."""
    return [
        {"what": what}
        | {
            column.key: statistics.median(run[column.key] for run in runs)
            for column in columns
            if column.key in runs[0]
        }
        for what, runs in found.items()
    ]


def add_ratio(rows: list[dict[str, Any]], key: str = "rows_per_s") -> None:
    """Give every row its ratio to the first one's."""
    for row in rows:
        row["ratio"] = row[key] / rows[0][key]


def shard_rates(ends: Sequence[float], start: float, rows: int) -> dict[str, float]:
    """What a bare loop over shards has to say, as a pool does.

    Args:
        ends: when each shard was written.
        start: when the process began to load its model.
        rows: of all shards but the first, before which nothing is measured.
    """
    return {
        "rows_per_s": rows / (ends[-1] - ends[0]),
        "first_shard_s": ends[0] - start,
        "seconds": ends[-1] - start,
    }


def tell(
    result: Mapping[str, Any], headline: str, *tables: tuple[Sequence[Any], Sequence[Column]]
) -> None:
    """Print where it was measured, and the tables."""
    where = (result["machine"], result["date"], f"load {result['load']:.1f}")
    print(f"{headline}, {', '.join(where)}\n")
    for rows, columns in tables:
        print(f"{markdown_table(rows, columns)}\n")


def write(path: Path | None, result: Any) -> None:
    """Write what was measured, if there is a file for it."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")

"""What all benchmarks share: where they run, rounds in turns, tables of medians, bars, JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ddray import __version__
from ddray.report.table import Column, markdown_table

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

FIGURES = (
    Column("what", "what"),
    Column("value", "measured", "", ".3g"),
    Column("bar", "bar"),
    Column("met", "met"),
)
"""Of the rows of figures."""


@dataclass(frozen=True)
class Figure:
    """What was measured, and the bar it is held to, if there is one.

    Attributes:
        what: its name.
        value: as measured.
        least: that is good enough.
        most: that is good enough.
    """

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def bar(self) -> float | None:
        """The bar as a number."""
        return self.most if self.least is None else self.least

    @property
    def missed(self) -> bool:
        """Whether there is a bar and the value is on its wrong side."""
        too_low = self.least is not None and self.value < self.least
        return too_low or (self.most is not None and self.value > self.most)

    def row(self) -> dict[str, Any]:
        """The figure as a row of a table."""
        row = {"what": self.what, "value": self.value, "bar": "", "met": ""}
        if self.bar is not None:
            row["bar"] = f"{'<=' if self.least is None else '>='} {self.bar:g}"
            row["met"] = "NO" if self.missed else "yes"
        return row


def figures_table(figures: Iterable[Figure]) -> tuple[list[dict[str, Any]], Sequence[Column]]:
    """Figures and their bars, for `tell`."""
    return [figure.row() for figure in figures], FIGURES


def pool_columns(rows: str, workers: str) -> tuple[Column, ...]:
    """Of a comparison of pools with a bare loop, in the words of what they make and who does."""
    return (
        Column("what", "what"),
        Column("rows_per_s", "rate", f"{rows}/s", ".1f"),
        Column("ratio", "x bare loop", "", ".3f"),
        Column("busy_share", f"{workers} busy", "", ".3f"),
        Column("first_shard_s", "first shard", "s", ".1f"),
        Column("seconds", "whole run", "s", ".1f"),
    )


def arguments(
    description: str, json_help: str = "write what was measured"
) -> argparse.ArgumentParser:
    """A parser with what every benchmark can be told; its help is the file's own docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=json_help)
    return parser


def load() -> float:
    """Processes that ran or waited for a core, averaged over the last minute."""
    return os.getloadavg()[0]


def about(*packages: str, device: str = "cpu", note: str = "") -> dict[str, Any]:
    """Where and when: machine, its load, versions of ddray and some packages, date.

    To be called before anything is measured: the load is that of others then.

    Args:
        packages: whose versions matter, beside ddray's.
        device: that computes, "cpu" or "cuda".
        note: on the machine, such as how many threads are used.
    """
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        # Not at the head of the file: the memory of what needs no torch is measured too.
        import torch

        machine = torch.cuda.get_device_name()
    # As a module tells it: what is installed does not say for which CUDA torch was built.
    versions = {name: import_module(name).__version__ for name in packages}
    return {
        "machine": f"{machine}, {note}" if note else machine,
        "load": load(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"ddray": __version__} | versions,
    }


def same_allocator() -> None:
    """Give processes that start from here what ddray gives to its workers."""
    # Not at the head of the file: some benchmarks run where there is no Ray.
    from ddray.runtime.cluster.connection import KEEP_FREED_MEMORY

    os.environ.update(KEEP_FREED_MEMORY)


def in_own_process(work: Callable[[Any], T], given: Any) -> T:
    """Work in a new process: a bare loop, which shares nothing with Ray's driver."""
    return in_own_processes(work, [given])[0]


def in_own_processes(work: Callable[[Any], T], given: Sequence[Any]) -> list[T]:
    """Work on everything given at once, on each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(given), mp_context=spawn) as processes:
        return [*processes.map(work, given)]


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time that work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(ways: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Results of all ways, each round by round: the speed of a machine drifts."""
    found: dict[K, list[T]] = {what: [] for what in ways}
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


def add_ratio(rows: list[dict[str, Any]], key: str = "rows_per_s", ratio: str = "ratio") -> None:
    """Give every row the ratio of a figure of its to the first row's."""
    for row in rows:
        row[ratio] = row[key] / rows[0][key]


def shard_rates(ends: Sequence[float], start: float, ready: float, rows: int) -> dict[str, float]:
    """What a bare loop over shards has to say, as a pool does.

    Args:
        ends: when each shard was written.
        start: when the process began to load its model.
        ready: when it had it.
        rows: of all shards.
    """
    return {
        "rows_per_s": rows / (ends[-1] - ready),
        "first_shard_s": ends[0] - start,
        "seconds": ends[-1] - start,
    }


def tell(
    result: Mapping[str, Any], headline: str, *tables: tuple[Sequence[Any], Sequence[Column]]
) -> None:
    """Print where it was measured, and the tables.

    Args:
        result: with what `about` found; its load may have become a list of some.
        headline: what was measured.
        tables: rows and columns of each.
    """
    loads = result["load"] if isinstance(result["load"], list) else [result["load"]]
    versions = (f"{name} {version}" for name, version in result["versions"].items())
    told_loads = " ".join(f"{value:.1f}" for value in loads)
    where = (result["machine"], result["date"], f"load {told_loads}", *versions)
    print(f"{headline}, {', '.join(where)}\n")
    for rows, columns in tables:
        print(f"{markdown_table(rows, columns)}\n")


def write(path: Path | None, result: Any) -> None:
    """Write what was measured, if there is a file for it."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def stop_if_missed(figures: Iterable[Figure]) -> None:
    """End the process with exit status 1 if a bar is missed."""
    missed = [figure.what for figure in figures if figure.missed]
    if missed:
        sys.exit(f"bars missed: {'; '.join(missed)}")

"""Filling a sharded set with a pool of Ray actors, whoever dies on the way.

Delivery is at least once, so writing a shard must be idempotent; that a set is whole is proved by
listing its storage, not by what actors returned. Imports ddray.config, errors, progress and the
cluster.
"""

import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ddray import errors
from ddray.config import PoolConfig
from ddray.errors import ClusterError, DDRayError, ShardError
from ddray.progress import Progress
from ddray.runtime.cluster import connect, require
from ddray.storage import Storage


class ShardWorker(Protocol):
    """Holds a model and writes shards; built in the actor, from a URI and a device."""

    def __init__(self, uri: str, device: str): ...

    def do(self, shard: int) -> int:
        """Make and commit one shard, and say how many rows it has."""


class ShardPlan(Protocol):
    """What of a plan the pool needs."""

    count: int

    def shard_range(self, k: int) -> range:
        """Indices of shard k."""


class ShardedSet(Protocol):
    """What of a set the pool needs."""

    @property
    def plan(self) -> Any:
        """A `ShardPlan`."""

    @property
    def storage(self) -> Storage:
        """Where it lies."""

    def missing(self) -> list[int]:
        """Shards that the storage lacks."""


@dataclass(frozen=True)
class Filled:
    """What filling took.

    Attributes:
        shards: shards made.
        rows: rows made.
        seconds: from before Ray was there to the proof that nothing is missing.
        first_shard_s: to the first shard.
    """

    shards: int = 0
    rows: int = 0
    seconds: float = 0.0
    first_shard_s: float | None = None

    def summary(self) -> dict[str, Any]:
        """As JSON values, with the rate."""
        return {
            "shards_made": self.shards,
            "rows_made": self.rows,
            "seconds": round(self.seconds, 3),
            "first_shard_s": self.first_shard_s and round(self.first_shard_s, 3),
            "rows_per_s": round(self.rows / self.seconds, 2) if self.rows else None,
        }


def fill(label: str, shards: ShardedSet, worker: type, config: PoolConfig) -> Filled:
    """Make the shards that a set lacks, and prove from its storage that it is whole.

    Args:
        label: what is made, for people.
        shards: the set.
        worker: a `ShardWorker` class.
        config: size of the pool.

    Raises:
        ClusterError: Ray cannot start, has too little, or actors keep dying.
        ShardError: shards are missing although every actor finished.
        DDRayError: whatever error of ours an actor raised.
    """
    missing, plan = shards.missing(), shards.plan
    if not missing:
        return Filled()
    uri = shards.storage.uri
    started, first_shard_s = time.monotonic(), None
    made = {k: len(plan.shard_range(k)) for k in missing}
    done = plan.count - sum(made.values())
    arguments = {"uri": uri, "device": "cuda" if config.num_gpus else "cpu"}
    with connect(), Progress(label, plan.count, "rows", done) as bar:
        require(config.threads, config.num_gpus, f"an actor for {label}")
        waiting = set(missing)
        for shard in _run(config, worker, arguments, missing):
            first_shard_s = first_shard_s or time.monotonic() - started
            if shard in waiting:
                waiting.remove(shard)
                bar.advance_to(bar.done + made[shard])
    still = shards.missing()
    if still:
        raise ShardError(
            f"{len(still)} shards are missing in {uri} although every actor finished; rerun to "
            "fill them"
        )
    return Filled(len(missing), sum(made.values()), time.monotonic() - started, first_shard_s)


class _Actor:
    """One actor of the pool: limits the threads before anything computes, builds the worker."""

    def __init__(self, worker: type, arguments: Mapping[str, Any], threads: int):
        import torch

        torch.set_num_threads(threads)
        self._worker: ShardWorker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        shard = int(batch["shard"][0])
        self._worker.do(shard)
        return {"shard": [shard]}


def _run(
    config: PoolConfig, worker: type, arguments: Mapping[str, Any], shards: Sequence[int]
) -> Iterator[int]:
    """Numbers of shards as they are done, in any order, some perhaps twice."""
    import ray.data
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = config.stall_timeout_s
    # What goes wrong is raised here; Ray Data would print the traces of its own threads as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Ray announces that free keyword arguments will go, but has no other way yet to bound restarts.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    least, most = (min(n, len(shards)) for n in config.workers)
    # Input from memory has no read task that could wait for a CPU which the pool has taken.
    plan = ray.data.from_items([{"shard": k} for k in shards], override_num_blocks=len(shards))
    done = plan.map_batches(
        _Actor,
        batch_size=1,
        num_cpus=config.threads,
        num_gpus=config.num_gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=least, max_size=most, max_tasks_in_flight_per_actor=2
        ),
        max_restarts=config.max_retries,
        max_task_retries=config.max_retries,
        fn_constructor_kwargs={
            "worker": worker,
            "arguments": dict(arguments),
            "threads": config.threads,
        },
    )
    try:
        for row in done.iter_rows():
            yield int(row["shard"])
    except (RayError, ray.data.exceptions.RayDataUserCodeException, TimeoutError) as error:
        raise _explain(error, config) from error


def _explain(error: BaseException, config: PoolConfig) -> DDRayError:
    """Our own error if an actor raised one, else one line about what happened to the pool."""
    # Ray tells what an actor raised in text: a remote traceback, and advice of its own behind it.
    ours = re.findall(r"^ddray\.errors\.(\w+): (.*)$", str(error), re.MULTILINE)
    if ours:
        name, message = ours[-1]
        return getattr(errors, name)(message)  # type: ignore[no-any-return]
    line = last_error(error)
    return ClusterError(
        f"the pool of {config.workers[0]}:{config.workers[1]} actors failed "
        f"({type(error).__name__}): {line}; what is written stays, and a rerun fills "
        "the gaps"
    )


def last_error(error: BaseException) -> str:
    """The innermost error that the text of a remote traceback names, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1][:600]

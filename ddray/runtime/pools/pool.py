"""Filling a sharded set with a pool of Ray actors, whoever dies on the way.

Delivery is at least once, so writing a shard must be idempotent; that a set is whole is proved by
listing its storage, not by what actors returned.
"""

import dataclasses
import gc
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ddray import errors
from ddray.config.base import PoolConfig
from ddray.errors import ClusterError, DDRayError, ShardError
from ddray.progress import Progress
from ddray.runtime.cluster.capacity import most_of, node_labels, require
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.doctor import preflight
from ddray.runtime.cluster.machine import Probe
from ddray.runtime.pools.tally import Done, Tally
from ddray.sets.makers import Maker
from ddray.sets.sharded_set import MANIFEST
from ddray.storage.base import Storage
from ddray.storage.run_folder import METRICS_FILE, EventLog, LineLog

_SHARD_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
"""Bounds of the histogram of shard times, s."""

_METRICS_EVERY_S = 30.0

_FRUITLESS_POOLS = 2
"""Pools in a row that may break without a shard before the run is given up."""


class ShardWorker(Protocol):
    """Writes shards; built in the actor, from a URI and the arguments of its crew.

    It limits its own threads, as its plan says: Ray sets OMP_NUM_THREADS by whole CPUs alone. What
    knows who computes says so, by an attribute `maker`; what encodes captions, by an attribute
    `encoding_s` how long it has done so.
    """

    def do(self, shard: int) -> int:
        """Make and commit one shard, and say how many rows it has."""


@dataclass(frozen=True)
class Crew:
    """The actors of a pool.

    Attributes:
        worker: a `ShardWorker` class.
        arguments: that it takes beside the set's URI.
        num_cpus: that each reserves.
        num_gpus: likewise.
        node_pool: label of the nodes that they may work on; None = any.
        models: names or URIs that they load.
        shards_at_once: of an actor, each in a thread of its own.
        notes: what the log says of them.
    """

    worker: type
    arguments: Mapping[str, Any]
    num_cpus: float
    num_gpus: float = 0
    node_pool: str | None = None
    models: Sequence[str] = ()
    shards_at_once: int = 1
    notes: Mapping[str, Any] = field(default_factory=dict)


class ShardPlan(Protocol):
    """What of a plan the pool needs."""

    @property
    def count(self) -> int:
        """Rows of the whole set."""

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""

    def shard_range(self, k: int) -> range:
        """Indices of shard k."""


class ShardsToFill(Protocol):
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
        shards: shards that were missing and are there now.
        rows: their rows.
        seconds: from before Ray was there to the proof that nothing is missing.
        first_shard_s: to the first shard.
        rows_per_s: rows by the time from the first actor's readiness to the last shard.
        actor_s: actor-seconds spent on shards.
        busy_share: part of the actors' lives that was.
        gpu_s: GPU-seconds spent on shards.
        encoding_s: of the actor-seconds, what went into features of captions.
        retries: shards and actors that had to be begun again.
    """

    shards: int = 0
    rows: int = 0
    seconds: float = 0.0
    first_shard_s: float | None = None
    rows_per_s: float | None = None
    actor_s: float = 0.0
    busy_share: float | None = None
    gpu_s: float = 0.0
    encoding_s: float = 0.0
    retries: int = 0

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "shards_made": self.shards,
            "rows_made": self.rows,
            "seconds": round(self.seconds, 3),
            "first_shard_s": self.first_shard_s and round(self.first_shard_s, 3),
            "rows_per_s": self.rows_per_s and round(self.rows_per_s, 2),
            "actor_seconds": round(self.actor_s, 2),
            "gpu_seconds": round(self.gpu_s, 2),
            "busy_share": self.busy_share and round(self.busy_share, 4),
            **self._captions(),
            "retries": self.retries,
        }

    def _captions(self) -> dict[str, float]:
        """What the text encoder took; nothing where there is none."""
        if not self.encoding_s:
            return {}
        return {
            "encoder_seconds": round(self.encoding_s, 2),
            "encoder_share": round(self.encoding_s / self.actor_s, 4),
        }


def tell_found(plan: ShardPlan, missing: Sequence[int]) -> None:
    """Say what a set has and what it lacks, before anything starts; nothing of an empty one."""
    there = plan.count - sum(len(plan.shard_range(k)) for k in missing)
    found = plan.num_shards - len(missing)
    if found:
        print(
            f"found {found} of {plan.num_shards} shards ({there} of {plan.count} rows); "
            f"{len(missing) or 'nothing'} to make",
            file=sys.stderr,
            flush=True,
        )


def fill(
    label: str,
    shards: ShardsToFill,
    crew: Crew,
    config: PoolConfig,
    ready: Callable[[], None] | None = None,
    note: Callable[[Maker | None], None] | None = None,
) -> Filled:
    """Make the shards that a set lacks, and prove from its storage that it is whole.

    Args:
        label: what is made, for people.
        shards: the set.
        crew: its actors.
        config: size of the pool.
        ready: called once it is sure that the cluster can run it, before the first shard.
        note: called with who has made a shard, for each that came.

    Raises:
        ClusterError: Ray cannot start, has too little, or actors keep dying.
        ShardError: shards are missing although every actor finished.
        DDRayError: whatever error of ours an actor raised.
    """
    missing, plan = shards.missing(), shards.plan
    there = plan.count - sum(len(plan.shard_range(k)) for k in missing)
    found = plan.num_shards - len(missing)
    if not missing:
        return Filled()
    storage = shards.storage
    started, tally, metrics = time.monotonic(), Tally(), LineLog(storage, METRICS_FILE)
    noted_at = started
    first_shard_s: float | None = None
    beginning = {
        "found": found,
        "missing": len(missing),
        "workers": config.workers,
        **crew.notes,
    }
    with (
        EventLog(storage, **beginning) as events,
        connect(),
        Progress(label, plan.count, "rows", there) as bar,
    ):
        least = min(config.workers[0], len(missing))
        require(label, least, crew.num_cpus, crew.num_gpus, config.wait_s, crew.node_pool)
        probes = [Probe(storage.uri, MANIFEST)]
        preflight(crew.num_cpus, crew.num_gpus, crew.node_pool, crew.models, probes)
        if ready is not None:
            ready()
        for done in _persist(config, label, crew, shards, events):
            now = time.monotonic()
            if note is not None:
                note(done.maker)
            if not tally.add(done, now):
                events.add("retry", **done.event())
                continue
            if first_shard_s is None:
                first_shard_s = now - started
            events.add("shard", **done.event())
            bar.begin(tally.began)
            bar.advance_to(bar.done + done.rows, tally.note(crew.num_gpus))
            if now - noted_at > _METRICS_EVERY_S or bar.done == plan.count:
                noted_at = now
                metrics.add(rows=bar.done, seconds=round(noted_at - started, 3), **tally.figures())
        metrics.flush()
        still = shards.missing()
        if still:
            raise ShardError(
                f"{len(still)} shards are missing in {storage.uri} although every actor finished; "
                "rerun to fill them"
            )
    return Filled(
        shards=len(missing),
        rows=plan.count - there,
        seconds=time.monotonic() - started,
        first_shard_s=first_shard_s,
        rows_per_s=tally.rows_per_s,
        actor_s=tally.busy_s,
        busy_share=tally.busy_share,
        gpu_s=tally.busy_s * crew.num_gpus,
        encoding_s=tally.encoding_s,
        retries=tally.retries,
    )


class _Actor:
    """One actor of the pool: builds the worker, and says what became of every shard."""

    def __init__(self, label: str, worker: type, arguments: Mapping[str, Any]):
        import ray
        from ray.util.metrics import Counter, Histogram

        self._worker: ShardWorker = worker(**arguments)
        context = ray.get_runtime_context()
        maker: Maker | None = getattr(self._worker, "maker", None)
        self._who = {
            "made_by": json.dumps(dataclasses.asdict(maker)) if maker else "",
            "node": ray.util.get_node_ip_address(),
            "actor": context.get_actor_id(),
            "pid": os.getpid(),
        }
        self._since = time.monotonic()
        # Shards may overlap: busy is who has at least one under way, and since when.
        self._lock, self._under_way = threading.Lock(), 0
        self._busy_s, self._busy_from = 0.0, 0.0
        tags = {"tag_keys": ("what",)}
        self._rows = Counter("ddray_rows_total", "Rows written by this actor.", **tags)
        self._seconds = Histogram(
            "ddray_shard_seconds", "Time of a shard.", boundaries=_SHARD_SECONDS, **tags
        )
        for metric in (self._rows, self._seconds):
            metric.set_default_tags({"what": label})

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        begin = time.monotonic()
        shard = int(batch["shard"][0])
        with self._lock:
            if not self._under_way:
                self._busy_from = begin
            self._under_way += 1
        try:
            rows = self._worker.do(shard)
        finally:
            with self._lock:
                end = time.monotonic()
                self._busy_s += end - self._busy_from
                self._busy_from = end
                self._under_way -= 1
                busy_s = self._busy_s
        self._rows.inc(rows)
        self._seconds.observe(end - begin)
        done = Done(
            shard=shard,
            rows=rows,
            seconds=end - begin,
            busy_s=busy_s,
            alive_s=end - self._since,
            encoding_s=getattr(self._worker, "encoding_s", 0.0),
            **self._who,
        )
        return {name: [value] for name, value in dataclasses.asdict(done).items()}


class _PoolLostError(ClusterError):
    """A pool that broke, though a new one may do better."""


def _persist(
    config: PoolConfig, label: str, crew: Crew, shards: ShardsToFill, events: EventLog
) -> Iterator[Done]:
    """Shards as they are done; where a pool breaks, a new one makes what is missing then.

    Ray gives a shard up after a few failures, and with it the pool: rightly for a shard that kills
    its actor each time, too soon for a node that is lost and not known to be. So this goes on for
    as long as pools get anywhere: what can be made is made before the error is told.
    """
    fruitless = 0
    while fruitless < _FRUITLESS_POOLS:
        fruitless += 1
        missing = shards.missing()
        if not missing:
            return
        if fruitless > 1:
            # From the other end: a shard that kills its actor must not stand before all others.
            missing.reverse()
        try:
            for done in _run(config, label, crew, shards.storage.uri, missing):
                fruitless = 0
                yield done
            return
        except _PoolLostError as error:
            # Not the error itself: its traceback holds the pool, and that its actors and CPUs.
            reason = str(error)
        gc.collect()
        events.add("pool lost", reason=reason)
    raise ClusterError(reason)


def _run(
    config: PoolConfig, label: str, crew: Crew, uri: str, shards: Sequence[int]
) -> Iterator[Done]:
    """Shards as they are done, in any order, some perhaps twice."""
    import ray.data
    from ray.data import ExecutionResources
    from ray.data.exceptions import ExecutionTimeoutError, RayDataUserCodeException
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = config.stall_timeout_s
    context.execution_options.label_selector = node_labels(crew.node_pool)
    # Ray Data asks a growing cluster for one more node of every kind while all are busy.
    cpus, gpus = most_of(config.workers[1], crew.num_cpus, crew.num_gpus, crew.node_pool)
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus, gpu=gpus)
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
        num_cpus=crew.num_cpus,
        num_gpus=crew.num_gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_tasks_in_flight_per_actor=crew.shards_at_once + 1,
            max_concurrent_calls_per_actor=crew.shards_at_once,
            enable_true_multi_threading=crew.shards_at_once > 1,
        ),
        # Machines may be taken away for days on end; a shard that kills its actor is another thing.
        max_restarts=-1,
        max_task_retries=config.max_retries,
        fn_constructor_kwargs={
            "label": label,
            "worker": crew.worker,
            "arguments": {"uri": uri, **crew.arguments},
        },
    )
    try:
        for row in done.iter_rows():
            yield Done.from_row(row)
    except ExecutionTimeoutError as error:
        raise ClusterError(
            f"{label}: no shard was done for {config.stall_timeout_s} s, so the pool was ended. If "
            "a shard takes so long, give a larger --stall-timeout-s; else look for actors that "
            "cannot start. What is written stays, and a rerun fills the gaps"
        ) from error
    except (RayError, RayDataUserCodeException) as error:
        raise _explain(error, config) from error


def _explain(error: BaseException, config: PoolConfig) -> DDRayError:
    """Our own error if an actor raised one, else one line about what happened to the pool."""
    # Ray tells what an actor raised in text: a remote traceback, and advice of its own behind it.
    ours = re.findall(r"^ddray(?:\.\w+)+\.(\w+): (.*)$", str(error), re.MULTILINE)
    if ours:
        name, message = ours[-1]
        return getattr(errors, name, DDRayError)(message)  # type: ignore[no-any-return]
    line = last_error(error)
    return _PoolLostError(
        f"the pool of {config.workers[0]}:{config.workers[1]} actors failed "
        f"({type(error).__name__}): {line}; what is written stays, and a rerun fills "
        "the gaps"
    )


def last_error(error: BaseException) -> str:
    """The innermost error that the text of a remote traceback names, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1][:600]

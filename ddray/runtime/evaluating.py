"""Evaluation by a pool of workers, on the cluster that a job was submitted to or on this machine.

Features are made by as many workers as there are; metrics, speed and pictures come from one more
task on a worker's node, for the driver of a job runs on the head, where work has no place.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ddray.config.base import PoolConfig, reserved_device
from ddray.config.evaluation import EvaluateConfig
from ddray.config.flags import command_of
from ddray.errors import ClusterError, one_line
from ddray.evaluation.evaluate import Evaluation, conclude, evaluate
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.generators import Generators
from ddray.evaluation.making import FeatureMaker
from ddray.evaluation.planning import Preparation
from ddray.evaluation.report import build_report, tables_as_text, write_evaluation
from ddray.runtime.cluster.capacity import node_labels, require
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.doctor import preflight
from ddray.runtime.cluster.limits import cap_threads
from ddray.runtime.pools.device import SHARDS_AT_ONCE, Device
from ddray.runtime.pools.pool import Crew, fill
from ddray.sets.makers import maker_on
from ddray.storage import open_storage

_RETRIES = 2

T = TypeVar("T")


class FeatureWorker:
    """An actor's models and feature networks, which make the next shard while one is written.

    Args:
        uri: of the evaluation.
        device: "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        features = FeatureSet.open(uri)
        work = Device(features.plan.threads)
        generators = Generators(features, device)
        self._maker = work.load(lambda: FeatureMaker(features, device, generators, work.batches))
        self.maker = maker_on(torch.device(device))

    def do(self, shard: int) -> int:
        """Make the features of one shard."""
        return self._maker.do(shard)


def make_features(label: str, features: FeatureSet, config: Any) -> dict[str, Any]:
    """Have a pool make what is missing of an evaluation; Ray must be there.

    Args:
        label: what is made, for people.
        features: the evaluation.
        config: size of the pool, a `PoolConfig`.

    Returns:
        What it took, as JSON values.

    Raises:
        ClusterError: the cluster has too little, or actors keep dying.
        DDRayError: whatever error of ours an actor raised.
    """
    plan = features.plan
    crew = Crew(
        FeatureWorker,
        {"device": reserved_device(config.num_gpus)},
        plan.threads,
        config.num_gpus,
        config.node_pool,
        [name for role, name in plan.models.items() if role != "data"],
        SHARDS_AT_ONCE,
    )
    return fill(label, features, crew, config).summary()


def evaluate_and_report(config: EvaluateConfig) -> str:
    """Evaluate where the job says, and write report.html, grid.png and summary.json.

    Returns:
        The tables, for a terminal.

    Raises:
        DDRayError: what an evaluation refuses or fails with.
    """
    if os.environ.get("RAY_ADDRESS") or config.workers[1] > 1:
        evaluation = evaluate_on_cluster(config)
    else:
        cap_threads()
        evaluation = evaluate(config)
    whose = "A student beside its teacher"
    if config.samples is not None:
        whose = "Images beside real ones"
    report = build_report(
        *(evaluation.summary, evaluation.pictures, evaluation.columns),
        title=whose,
        subtitle=config.samples or config.student,
        settings={"evaluate": config.model_dump(mode="json")},
        commands=[command_of("evaluate", config)],
    )
    shown = evaluation.pictures, evaluation.columns
    write_evaluation(config.out, evaluation.summary, report, *shown)
    if not config.keep_features:
        FeatureSet.open(config.out).delete()
    print(f"evaluation: {open_storage(config.out).join('report.html')}", file=sys.stderr)
    return tables_as_text(evaluation.summary)


def evaluate_on_cluster(config: EvaluateConfig) -> Evaluation:
    """As `ddray.evaluation.evaluate.evaluate`, by a pool of workers.

    Raises:
        ClusterError: if the cluster cannot be reached, or has no room.
        DDRayError: what `evaluate` raises.
    """
    started = time.monotonic()
    open_storage(config.out).check_writable()
    if config.threads is None:
        config = config.model_copy(update={"threads": 1})
    prepared = Preparation(config)
    features, judges = prepared.begin(), prepared.judges
    del prepared  # and its models: a driver needs no more of them

    def task() -> Evaluation:
        torch.set_num_threads(features.plan.threads)
        return conclude(config, features, judges, started=None)

    kinds = {generator.kind for generator in features.plan.generators}
    with connect():
        if "independent" in kinds and "data" not in features.plan.models:
            # They are counted in the tokens of the teacher by transport.
            make_features("evaluation", features.only(kinds - {"independent"}), config)
        make_features("evaluation", features, config)
        told = "evaluation: metrics, pictures, speed and how exact the transport is, on one worker"
        print(told, file=sys.stderr, flush=True)
        evaluation = on_worker("evaluation", task, config)
    evaluation.summary["seconds"] = round(time.monotonic() - started, 1)
    return evaluation


def on_worker(label: str, task: Callable[[], T], config: PoolConfig) -> T:
    """Do one task with what a worker of the pool has; it is begun again where its node is lost.

    Raises:
        ClusterError: if the cluster has no room, or the task keeps being lost.
        DDRayError: what it raises.
    """
    import ray

    threads = config.threads or 1
    require(label, 1, threads, config.num_gpus, config.wait_s, config.node_pool)
    preflight(threads, config.num_gpus, config.node_pool, [])
    asked = {"num_cpus": threads, "num_gpus": config.num_gpus, "max_retries": _RETRIES}
    labels = node_labels(config.node_pool)
    try:
        found: T = ray.get(ray.remote(**asked, label_selector=labels)(task).remote())
        return found
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the {label} was lost: {one_line(error)}") from error

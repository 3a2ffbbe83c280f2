"""Replicas of Ray Serve that work through a data set: those of a running service, or private ones.

Ray Serve reads its environment when it is imported, so a job imports this after it has a Ray.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ddray.config.base import reserved_device
from ddray.config.generation import GenerateConfig
from ddray.config.serving import ServeConfig
from ddray.errors import ClusterError, DDRayError
from ddray.runtime.cluster.capacity import node_labels, require
from ddray.runtime.cluster.doctor import preflight
from ddray.runtime.pools.image_workers import HandleWorker
from ddray.runtime.pools.pool import Crew
from ddray.runtime.serving.app import APP_NAME, STUDENTS, described, failure_reason
from ddray.runtime.serving.replica import Stock, StudentReplica
from ddray.runtime.serving.stopping import remove
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.plan import ImagePlan

log = logging.getLogger("ray.serve")

_MODEL = "student"
# They wait for batches and compress: a whole CPU would not be there on the smallest machines.
_ASKING_CPUS = 0.5
# Batches that an autoscaled replica should have: one under way, one waiting.
_BATCHES_OF_A_REPLICA = 2
_UPSCALE_DELAY_S = 5.0
# A driver that is killed cannot end its replicas. They have no work then, and leave by themselves.
_IDLE_S = 120.0
_LOOK_S = 30.0


@contextmanager
def asking_crew(images: ImageSet, config: GenerateConfig, shards_at_once: int) -> Iterator[Crew]:
    """Actors that ask replicas, which are there for as long as the context lasts.

    Raises:
        ClusterError: if the cluster is too small, or the replicas do not start.
    """
    # Serve tells each step of its start on the terminal of who starts it.
    log.setLevel(logging.WARNING)
    was_running = bool(serve.status().applications)
    model = _served(images.plan, config) if was_running else None
    # A rerun after a driver that was killed replaces what it left.
    private = f"ddray-images-{hashlib.sha256(images.uri.encode()).hexdigest()[:12]}"
    service = APP_NAME if model else private
    try:
        if model is None:
            _start(private, images.plan, config)
        yield Crew(
            HandleWorker,
            {
                "application": service,
                "deployment": STUDENTS,
                "model": model or _MODEL,
                "retries": config.max_retries,
                "encoders": config.encoder_threads,
                "statistics": images.statistics,
            },
            _ASKING_CPUS,
            node_pool=config.node_pool,
            shards_at_once=shards_at_once,
            notes={"service": service},
        )
    finally:
        if model is None:
            remove(private)


def _served(plan: ImagePlan, config: GenerateConfig) -> str | None:
    """Name by which the service that runs here serves the plan's student, if it does."""
    if APP_NAME not in serve.status().applications:
        return None
    try:
        model = described(config.student, ServeConfig(text_encoder=plan.text_encoder or None)).id
        handle = serve.get_deployment_handle(STUDENTS, APP_NAME)
        found = handle.holds.remote(model).result(timeout_s=_LOOK_S)
    except (DDRayError, RayError, RayServeException, TimeoutError):
        return None
    wanted = {name: getattr(plan, name) for name in found} if found else None
    return model if found and found == wanted else None


def _start(application: str, plan: ImagePlan, config: GenerateConfig) -> None:
    """Start private replicas."""
    least, most = config.workers
    require("images", least, plan.threads, config.num_gpus, config.wait_s, config.node_pool)
    preflight(plan.threads, config.num_gpus, config.node_pool, [plan.student])
    deployment = serve.deployment(
        StudentReplica,
        name=STUDENTS,
        user_config={
            "max_batch_size": plan.batch_size,
            "batch_wait_s": 0.0,
            "hung_s": config.stall_timeout_s,
        },
        autoscaling_config={
            "min_replicas": 0,
            "initial_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": _BATCHES_OF_A_REPLICA,
            "upscale_delay_s": _UPSCALE_DELAY_S,
            "downscale_delay_s": _IDLE_S,
            "metrics_interval_s": 1.0,
            "look_back_period_s": _UPSCALE_DELAY_S,
        },
        # Whatever a replica's share is, the workers send no more than they have in flight.
        max_ongoing_requests=8,
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": plan.threads,
            "num_gpus": config.num_gpus,
            "label_selector": node_labels(config.node_pool),
        },
    )
    stock = Stock(
        students={_MODEL: plan.student},
        teacher=False,
        text_encoder=plan.text_encoder or None,
        rows=None,
        threads=plan.threads,
        in_memory=1,
        device=reserved_device(config.num_gpus),
        dtype=plan.dtype,
        decode_dtype=plan.decode_dtype,
    )
    if not serve.status().proxies:
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
    try:
        serve.run(deployment.bind(stock), name=application, route_prefix=None)
    except (RuntimeError, ValueError, RayServeException) as error:
        reason = failure_reason(error, application)
        raise ClusterError(f"the replicas of {plan.student} did not start: {reason}") from error

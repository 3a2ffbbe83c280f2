"""Images in bulk: a plan, a pool that has students or asks replicas for batches, shards."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from ddray import __version__
from ddray.config.base import PoolConfig, reserved_device
from ddray.config.generation import GenerateConfig
from ddray.errors import ConfigError
from ddray.metrics.fd_digits import DigitsMetric
from ddray.metrics.network import POOL, FeatureNetwork
from ddray.models.zoo import load_student
from ddray.runtime.cluster.connection import connect
from ddray.runtime.pools.device import SHARDS_AT_ONCE
from ddray.runtime.pools.image_workers import StudentWorker
from ddray.runtime.pools.pool import Crew, Filled, fill, tell_found
from ddray.sets.captions import left_out
from ddray.sets.conditions import open_captions
from ddray.sets.images.finishing import finish
from ddray.sets.images.image_set import SAMPLES, ImageSet
from ddray.sets.images.making import make_plan, planned_student
from ddray.sets.images.statistics import extractor_of, merge, network_order, statistics_name
from ddray.sets.makers import MakersOfSet, makers_of
from ddray.sets.making import create_set
from ddray.storage import open_storage
from ddray.storage.run_folder import SUMMARY_FILE, write_json

STATISTICS_FILE = "statistics.npz"


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Fill an image set; a rerun fills gaps only.

    Args:
        config: the job.

    Returns:
        Summary: what is there and what was made, seconds, images/s.

    Raises:
        ConfigError: settings, captions or a schedule that do not fit, or another plan at the URI.
        StorageError: the URI cannot be written, or the captions not read.
        ClusterError: Ray cannot start, or the pool keeps failing.
        ShardError: shards are missing although the pool finished.
    """
    storage = open_storage(config.out)
    storage.check_writable()
    student = load_student(config.student, device="cpu", dtype=config.student_dtype)
    captions = open_captions(config, student)
    if captions is not None and captions.has_features and config.engine == "serve":
        raise ConfigError(
            f"engine=serve, but {captions.uri} has features: replicas encode captions themselves; "
            "take engine=data"
        )
    plan = make_plan(config, student, captions)
    statistics = statistics_name(config, student)
    extractor = extractor_of(config, statistics)
    images = create_set(ImageSet, config, plan, student, captions)
    images.statistics = statistics
    plan = images.plan
    filled = _fill(images, config)
    summary = {
        "uri": images.uri,
        "ddray_version": __version__,
        "plan_hash": plan.hash,
        "student": plan.student,
        "schedule": plan.schedule,
        "images": plan.count,
        **left_out(captions),
        "format": plan.encoding,
        "content": plan.content,
        "engine": config.engine,
        "made_by": [asdict(maker) for maker in makers_of(storage)],
        **({"samples": images.storage.join(SAMPLES)} if plan.encoding == "npz" else {}),
        **(_statistics(images, extractor) if extractor else {}),
        **filled.summary(),
    }
    write_json(storage, SUMMARY_FILE, summary)
    return summary


def refill(uri: str, pool: PoolConfig) -> dict[str, Any]:
    """Make what an existing set lacks, by its own plan.

    Args:
        uri: of the set.
        pool: size of the pool; its `threads` give way to the plan's.

    Returns:
        How many shards and rows were made, and how fast.

    Raises:
        ConfigError: the plan's student is not here.
        ShardError: there is no set, the student has other weights, or shards stay missing.
        StorageError: the URI cannot be written.
        ClusterError: Ray cannot start, or the pool keeps failing.
    """
    images = ImageSet.open(uri)
    images.storage.check_writable()
    planned_student(images.plan, "cpu")
    config = GenerateConfig(
        **{**pool.model_dump(), "threads": images.plan.threads, "engine": "data"}
    )
    return _fill(images, config).summary()


def _fill(images: ImageSet, config: GenerateConfig) -> Filled:
    """Make what is missing, and what is made of all shards."""
    missing = images.missing()
    tell_found(images.plan, missing)
    filled = Filled()
    if missing:
        with connect(), _crew(images, config) as crew:
            makers = MakersOfSet(images.storage, len(missing) < images.plan.num_shards)
            filled = fill("images", images, crew, config, images.begin, makers.note)
    finish(images, images.lacking())
    return filled


def _crew(images: ImageSet, config: GenerateConfig) -> AbstractContextManager[Crew]:
    """The actors of the job's engine, and whatever they need for as long as they work."""
    if config.engine == "serve":
        # Ray Serve reads its environment when it is imported, so Ray comes first.
        from ddray.runtime.pools.fleet import asking_crew

        return asking_crew(images, config, SHARDS_AT_ONCE)
    crew = Crew(
        StudentWorker,
        {
            "device": reserved_device(config.num_gpus),
            "encoders": config.encoder_threads,
            "statistics": images.statistics,
            "network": network_order(config),
        },
        config.threads,
        config.num_gpus,
        config.node_pool,
        [images.plan.student],
        SHARDS_AT_ONCE,
    )
    return nullcontext(crew)


def _statistics(images: ImageSet, extractor: DigitsMetric | FeatureNetwork) -> dict[str, Any]:
    """Merge what lies beside the shards into one file, and judge digits."""
    found = merge(images, extractor)
    images.storage.write(STATISTICS_FILE, found.to_bytes())
    told: dict[str, Any] = {
        "statistics": images.storage.join(STATISTICS_FILE),
        "statistics_network": found.network,
        "statistics_extractor": found.extractor,
    }
    if isinstance(extractor, DigitsMetric):
        told["fd_digits"] = round(extractor.reference.distance(found.statistics[POOL]), 4)
    return told

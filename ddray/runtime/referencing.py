"""Statistics of real images by a pool of workers, or in this process."""

import os
import time
from typing import Any

import torch

from ddray.config.base import reserved_device
from ddray.config.reference import ReferenceConfig
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.making import FeatureMaker, fill_here
from ddray.evaluation.reference_making import begun, finish, made, prepare


def reference(config: ReferenceConfig) -> dict[str, Any]:
    """Make the file that a job asks for, or go on with what of it is there.

    Returns:
        What stands in it, and what it took, as JSON values.

    Raises:
        ClusterError: if the cluster cannot be reached, or has no room.
        DDRayError: for a source, weights or a place that cannot be read or written.
    """
    started = time.monotonic()
    features = begun(config, prepare(config))
    if features is None:
        summary = made(config)
    elif os.environ.get("RAY_ADDRESS") or config.workers[1] > 1:
        summary = _on_cluster(config, features)
    else:
        _here(config, features)
        summary = finish(config, features)
    return {**summary, "seconds": round(time.monotonic() - started, 1)}


def _here(config: ReferenceConfig, features: FeatureSet) -> None:
    torch.set_num_threads(features.plan.threads)
    fill_here("reference", features, FeatureMaker(features, reserved_device(config.num_gpus)))


def _on_cluster(config: ReferenceConfig, features: FeatureSet) -> dict[str, Any]:
    # With the page of an evaluation and its charts, which nobody here draws.
    from ddray.runtime.cluster.connection import connect
    from ddray.runtime.evaluating import make_features, on_worker

    # The sums need no GPU.
    alone: Any = config.model_copy(update={"num_gpus": 0})
    with connect():
        make_features("reference", features, config)
        return on_worker("reference", lambda: finish(config, features), alone)

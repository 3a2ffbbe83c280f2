"""Distillation on a cluster whose nodes are taken back or lost in mid-run."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ddray.config.distillation import DistillConfig
from ddray.runtime.training.driver import distill, read_history
from tests.chaos.job import write_set
from tests.patience import PATIENCE_S
from tests.runtime.tiny import distilling

pytestmark = pytest.mark.chaos

RUN: dict[str, Any] = {"steps": 600, "batch_size": 64, "checkpoint_every": 100, "lr": 1e-3}
# What a cloud gives; Train looks for a notice every 5 s, and so do we.
NOTICE_S = 15
# They take longer than the notice on a fast machine too.
MANY_STEPS = 1500


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 60 trajectories to train on."""
    return write_set(teacher, tmp_path_factory.mktemp("sets") / "data")


def _events(config: DistillConfig, event: str) -> list[dict[str, Any]]:
    lines = (Path(config.out) / "events.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def _losses(config: DistillConfig) -> list[float]:
    history = read_history(config.out)
    assert [line["step"] for line in history] == list(range(1, config.steps + 1))
    return [line["loss"] for line in history]


def _disturbed(config: DistillConfig, disturb: Callable[[], None]) -> list[float]:
    """The losses of a run to which something happens once it has a checkpoint to go on from."""
    with ThreadPoolExecutor() as pool:
        # Nodes can be added in the main thread only.
        run = pool.submit(distill, config)
        while not any(Path(config.out).glob("checkpoints-*/*snapshot.json")):
            assert not run.done(), run.result()
            time.sleep(0.05)
        disturb()
        run.result(timeout=PATIENCE_S)
    return _losses(config)


def _add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)


def _announce_end(node: Any) -> None:
    """Announce that a node will be gone soon, as a cloud's agent does."""
    preemption = 2
    deadline_ms = int((time.time() + NOTICE_S) * 1000)
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(node.node_id, preemption, "spot", deadline_ms)
    assert accepted, why


def test_a_node_that_is_taken_back_costs_no_step(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    node = _add_node(cluster)
    cluster.wait_for_nodes()
    run = {**RUN, "steps": MANY_STEPS, "workers": (2, 2)}
    config = distilling(data, tmp_path / "undisturbed", **run)
    distill(config)
    undisturbed = _losses(config)

    def take_back() -> None:
        _add_node(cluster)
        _announce_end(node)

    config = distilling(data, tmp_path / "run", max_failures=0, **run)
    assert _disturbed(config, take_back) == pytest.approx(undisturbed, rel=1e-3)
    (notice,) = _events(config, "preemption")
    (resumed,) = _events(config, "resumed")
    assert resumed["step"] >= notice["step"]
    assert (resumed["workers"], resumed["optimizer_moments"]) == (2, "kept")


def test_with_a_lost_node_the_run_goes_on_with_the_workers_that_are_left(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    node = _add_node(cluster)
    cluster.wait_for_nodes()
    config = distilling(data, tmp_path / "run", workers=(1, 2), **RUN)
    losses = _disturbed(config, lambda: cluster.remove_node(node, allow_graceful=False))
    (resumed,) = _events(config, "resumed")
    assert (resumed["workers_before"], resumed["workers"]) == (2, 1)
    assert resumed["optimizer_moments"] == "kept"
    assert losses[-1] < losses[0] / 2

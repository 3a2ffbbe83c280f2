"""Trajectory sampling on a cluster of several nodes, some of which come late or are lost."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import ddray
from ddray.errors import ClusterError
from ddray.runtime.pools.pool import Crew, fill
from ddray.runtime.pools.sampling import TrajectoryWorker, sample
from ddray.sets.trajectories.making import make_plan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import contents, sampling

pytestmark = pytest.mark.chaos

# So many evaluations only to make a shard last: time to strike.
SLOW: dict[str, Any] = {"count": 96, "shard_rows": 8, "batch_size": 8, "num_evals": 2400}


def _after_shards(out: Path, number: int, act: Any) -> threading.Thread:
    """Do something once so many shards are there."""

    def wait() -> None:
        wait_until(lambda: len(list(out.glob("shards/*.parquet"))) >= number, "shard")
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_lost_node_changes_no_byte_of_the_set(
    cluster: Cluster, teacher: str, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
    cluster.wait_for_nodes()
    out = tmp_path / "lost"
    kill = _after_shards(out, 2, lambda: cluster.remove_node(nodes[0], allow_graceful=False))
    summary = sample(sampling(teacher, out, **SLOW, workers=(3, 3)))
    kill.join()
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) <= 2, "loss of the node")
    assert summary["rows_made"] == SLOW["count"]
    assert TrajectorySet.open(str(out)).verify().ok
    undisturbed = tmp_path / "undisturbed"
    sample(sampling(teacher, undisturbed, **SLOW, workers=(1, 1)))
    assert contents(out, "shards") == contents(undisturbed, "shards")


def test_a_job_waits_for_nodes_only_if_told_to(
    cluster: Cluster, teacher: str, tmp_path: Path
) -> None:
    job = sampling(teacher, tmp_path / "set", workers=(3, 3))
    with pytest.raises(ClusterError, match="3 workers of 1 CPUs .* has room for 1"):
        sample(job)
    summaries: list[dict[str, Any]] = []
    patient = job.model_copy(update={"wait_s": PATIENCE_S})
    waiting = threading.Thread(target=lambda: summaries.append(sample(patient)))
    waiting.start()
    time.sleep(2)
    assert not summaries
    cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    waiting.join(timeout=PATIENCE_S)
    assert [summary["rows_made"] for summary in summaries] == [job.count]


def test_a_shard_that_kills_its_actor_each_time_is_the_only_one_missing(
    cluster: Cluster, teacher: str, tmp_path: Path
) -> None:
    class DeadlyWorker(TrajectoryWorker):
        def do(self, shard: int) -> int:
            if shard == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().do(shard)

    config = sampling(teacher, tmp_path, max_retries=1, stall_timeout_s=90)
    model = ddray.load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(config.out, make_plan(config, model))
    with pytest.raises(ClusterError, match="the pool of 1:1 actors failed"):
        crew = Crew(DeadlyWorker, {"device": "cpu"}, config.threads)
        fill("trajectories", trajectories, crew, config)
    assert trajectories.missing() == [1]


def _deadly(method: str) -> type:
    """A worker that kills its own process in one of its methods."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return type("DeadlyWorker", (), {"__init__": lambda *_, **__: None, method: die})


@pytest.mark.parametrize(
    ("method", "stall_s", "message"),
    [("do", 90, "the pool of 1:1 actors failed"), ("__init__", 20, "no shard was done for 20 s")],
)
def test_workers_that_die_each_time_end_the_run_in_one_line(
    cluster: Cluster, teacher: str, tmp_path: Path, method: str, stall_s: int, message: str
) -> None:
    config = sampling(teacher, tmp_path, max_retries=2, stall_timeout_s=stall_s)
    model = ddray.load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(config.out, make_plan(config, model))
    with pytest.raises(ClusterError, match=message) as refusal:
        fill("trajectories", trajectories, Crew(_deadly(method), {}, config.threads), config)
    assert "\n" not in str(refusal.value)
    assert "a rerun fills the gaps" in str(refusal.value)

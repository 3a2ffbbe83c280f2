"""A cluster that grows and shrinks by itself: Ray's autoscaler, on nodes of this machine."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)

from ddray.runtime.cluster.capacity import NODE_POOL_LABEL
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import Job
from tests.chaos.ray_head import RayHead, ray_head
from tests.loopback import free_port
from tests.patience import wait_until

pytestmark = pytest.mark.chaos

_IDLE_MINUTES = 0.2
_MOST_NODES = 3


def _config(address: str) -> dict[str, object]:
    """What `ray up` would have written to the head, for a provider that makes processes."""
    commands = {
        name: []
        for name in (
            "initialization_commands",
            "setup_commands",
            "head_setup_commands",
            "worker_setup_commands",
            "head_start_ray_commands",
            "worker_start_ray_commands",
            "cluster_synced_files",
        )
    }
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "fake",
        "max_workers": 2 * _MOST_NODES,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "upscaling_speed": 8.0,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            # As in ray-cluster.yaml: nothing runs on the head.
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                pool: {
                    "resources": {"CPU": 1, "object_store_memory": 100 * 2**20},
                    "labels": {NODE_POOL_LABEL: pool},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": _MOST_NODES,
                }
                for pool in ("cpu", "sampling")
            },
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **commands,
    }


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[RayHead]:
    ip, port = ray.util.get_node_ip_address(), free_port()
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(_config(f"{ip}:{port}")))
    with ray_head(
        f"--autoscaling-config={file}",
        num_cpus=0,
        ip=ip,
        port=port,
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
    ) as head:
        yield head


def _raylets(head: RayHead) -> dict[str, psutil.Process]:
    """Processes of the nodes that it has made, by their pools and numbers."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == head.process.pid and process.name() == "raylet":
                labels = json.loads(process.environ().get("RAY_OVERRIDE_LABELS", "{}"))
                if pool := labels.get(NODE_POOL_LABEL):
                    found[f"{pool}-{process.pid}"] = process
    return found


def _job(start: Callable[..., Job], head: RayHead, *flags: str) -> Job:
    token = {k: v for k, v in head.environment.items() if k.startswith("RAY_AUTH")}
    return start(*flags, RAY_ADDRESS=head.address, **token)


def test_sampling_brings_its_nodes_up_survives_one_and_lets_them_go(
    growing: RayHead, start: Callable[..., Job], teacher: str, tmp_path: Path
) -> None:
    assert not _raylets(growing)
    out = tmp_path / "set"
    sampling = ("sample", "--teacher", teacher, "--out", str(out), "--node-pool", "sampling")
    sizes = ("--count", "240", "--shard-rows", "8", "--batch-size", "8", "--num-evals", "2400")
    job = _job(start, growing, *sampling, *sizes, "--workers", f"1:{_MOST_NODES}")
    job.until(lambda: len(_raylets(growing)) >= 2)
    job.until(lambda: len(list(out.glob("shards/*.parquet"))) >= 3)
    next(iter(_raylets(growing).values())).kill()
    status, stdout, stderr = job.end()
    assert status == 0, stderr
    assert json.loads(stdout)["rows_made"] == 240
    assert TrajectorySet.open(str(out)).verify().ok
    # It asked for nodes of its pool and for no others.
    assert all(name.startswith("sampling") for name in _raylets(growing))
    wait_until(lambda: not _raylets(growing), "end of the nodes")


def test_what_no_growth_can_bring_is_refused_at_once_and_brings_up_nothing(
    growing: RayHead, start: Callable[..., Job], teacher: str, tmp_path: Path
) -> None:
    sizes = ("--count", "80", "--shard-rows", "8", "--batch-size", "8")
    cases = (
        (("--workers", f"{2 * _MOST_NODES + 1}"), "asks for 7 workers of 1 CPUs"),
        (("--node-pool", "sampling", "--workers", f"{_MOST_NODES + 1}"), "asks for 4 workers"),
        (("--threads", "2"), "asks for 1 workers of 2 CPUs and 0 GPUs"),
        (("--num-gpus", "1"), "asks for 1 workers of 1 CPUs and 1 GPUs"),
        (("--node-pool", "training"), f"on nodes with the label {NODE_POOL_LABEL}=training"),
    )
    for number, (flags, message) in enumerate(cases):
        out = str(tmp_path / f"set-{number}")
        sampling = ("sample", "--teacher", teacher, "--out", out, *sizes, *flags)
        status, _, stderr = _job(start, growing, *sampling).end()
        assert status == 1, stderr
        assert message in stderr
        assert "more than this cluster can grow to" in stderr
        assert "Traceback" not in stderr
    assert not _raylets(growing)

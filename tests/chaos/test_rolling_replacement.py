"""Every node of a cluster is replaced, one after the other, while it works.

As an upgrade of the nodes' image does it: the new one is there before the old one is told to go.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import logged_steps, write_set
from tests.chaos.network import Network, asking, ray_network, running, until
from tests.chaos.ray_head import end
from tests.chaos.service import RAW
from tests.loopback import free_port
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import contents

pytestmark = pytest.mark.chaos

NODES = 2


class Fleet:
    """The nodes of a network, each of which can be replaced by one on a free host."""

    def __init__(self, network: Network):
        self.network = network
        self._used = list(network.hosts[1 : NODES + 1])
        self._free = list(network.hosts[NODES + 1 :])
        for number, host in enumerate(self._used, 2):
            network.add_node(host, num_cpus=2)
            network.until_nodes(number)

    def replace_oldest(self) -> None:
        """Add a node, then end the one that has been there longest."""
        host = self._free.pop(0)
        self.network.add_node(host, num_cpus=2)
        self.network.until_nodes(NODES + 2)
        end(self.network.nodes.pop(0))
        self._free.append(self._used.pop(0))
        self._used.append(host)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with ray_network(1 + NODES + 1) as network:
        yield Fleet(network)


def test_a_set_has_the_same_bytes(fleet: Fleet, teacher: str, tmp_path: Path) -> None:
    sizes = {"count": 192, "shard_rows": 8, "batch_size": 8, "num_evals": 2400}
    undisturbed = contents(write_set(teacher, tmp_path / "undisturbed", **sizes), "shards")
    out = tmp_path / "set"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    where = ("--teacher", teacher, "--out", str(out), "--workers", "1:2", "--wait-s", "60")
    with running(fleet.network, "sample", *where, *flags) as job:
        for shards in (4, 12):
            until(job, lambda n=shards: len(list((out / "shards").glob("*.parquet"))) >= n)
            fleet.replace_oldest()
        _, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert contents(out, "shards") == undisturbed
    assert TrajectorySet.open(str(out)).verify().ok


def test_a_training_takes_every_step(fleet: Fleet, teacher: str, tmp_path: Path) -> None:
    data, out = write_set(teacher, tmp_path / "set"), tmp_path / "run"
    where = ("--data", str(data), "--out", str(out), "--workers", "1:2", "--wait-s", "60")
    sizes = ("--batch-size", "64", "--threads", "1", "--schedule", "0,8", "--log-every", "1")
    often = ("--steps", "600", "--checkpoint-every", "25", "--step-timeout-s", "20")

    with running(fleet.network, "distill", *where, *sizes, *often) as job:
        for step in (50, 300):
            until(job, lambda n=step: max(logged_steps(out), default=0) >= n)
            fleet.replace_oldest()
        _, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert sorted(set(logged_steps(out))) == list(range(1, 601))
    assert (out / "student" / "model.safetensors").is_file()


def test_no_request_fails(fleet: Fleet, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}{RAW}"
    # Of students and of fronts two, so that one may go.
    two = ("--replicas", "2", "--ingress-replicas", "2")
    with running(fleet.network, "serve", *two, "--port", str(port)) as job:
        with asking(fleet.network.hosts[0], tmp_path, url) as told:
            wait_until(lambda: "answered" in told(), "answer", lambda: job.poll() is None)
            ready = len(told())
            for _ in range(NODES):
                before = len(told())
                fleet.replace_oldest()
                wait_until(lambda n=before: len(told()) >= n + 20, "further answers")
                time.sleep(10)
        answers = told()[ready:]
    assert len(answers) >= 40
    assert set(answers) == {"answered"}

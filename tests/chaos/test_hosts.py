"""A cluster of hosts with addresses of their own, of which one is cut off."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import ddray
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.hosts import Host, hosts
from tests.chaos.job import write_set
from tests.chaos.ray_head import BIN, RayHead, end, ray_head
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import command, environment

pytestmark = pytest.mark.chaos

# Seconds after which a host that does not answer counts as lost: 5 x (3 + 10) by default.
_QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Network:
    """A head on the first host, and nodes on others."""

    head: RayHead
    hosts: list[Host]
    nodes: list[subprocess.Popen[bytes]]

    def add_node(self, host: Host, *before: str) -> subprocess.Popen[bytes]:
        """`ray start` on a host, after other commands if need be."""
        command = [*host.enter, *before, str(BIN / "ray"), "start", "--block", "--num-cpus=1"]
        command += [f"--address={self.head.address}", f"--node-ip-address={host.address}"]
        command += ["--object-store-memory=104857600", "--disable-usage-stats"]
        with (self.head.folder / f"{host.namespace}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=self.head.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until_nodes(self, number: int) -> None:
        """Wait for so many nodes, the head among them."""
        code = (
            "import sys, time, ray; ray.init(address=sys.argv[1], log_to_driver=False)\n"
            f"while sum(node['Alive'] for node in ray.nodes()) < {number}: time.sleep(0.2)"
        )
        command = [*self.hosts[0].enter, sys.executable, "-c", code, self.head.address]
        subprocess.run(command, env=self.head.environment, timeout=PATIENCE_S, check=True)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`ddray ...` on the head's host."""
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME")
        variables = {name: self.head.environment[name] for name in names}
        return subprocess.Popen(
            [*self.hosts[0].enter, *command(*arguments)],
            env=environment(RAY_ADDRESS=self.head.address, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def network() -> Iterator[Network]:
    """A head without CPUs, and two hosts of one each; the machine's disk is what they share."""
    with _network() as network:
        # One after the other: on one machine they choose their sockets by what is taken.
        for number, host in enumerate(network.hosts[1:], 2):
            network.nodes.append(network.add_node(host))
            network.until_nodes(number)
        yield network


@contextlib.contextmanager
def _network() -> Iterator[Network]:
    """A head on the first of three hosts; what nodes are added end with it."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts(3))
        # Collectives find each other by the address of a card, not by the machine's name.
        names = {**_QUICK, "GLOO_SOCKET_IFNAME": "eth0"}
        head = stack.enter_context(
            ray_head(num_cpus=0, ip=made[0].address, prefix=made[0].enter, **names)
        )
        network = Network(head, made, [])
        try:
            yield network
        finally:
            for node in network.nodes:
                end(node)


@contextlib.contextmanager
def _running(network: Network, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A job; what a failed test leaves of it is ended."""
    job = network.start(*arguments)
    try:
        yield job
    finally:
        if job.poll() is None:
            for process in (*psutil.Process(job.pid).children(recursive=True), job):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            job.communicate(timeout=PATIENCE_S)


def _events(out: Path, event: str) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def _until(job: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    wait_until(condition, "what is waited for", lambda: job.poll() is None, job.communicate)


def test_sampling_runs_across_hosts_and_survives_one_that_is_cut_off(
    network: Network, teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    sizes = ("--count", "160", "--shard-rows", "8", "--batch-size", "8", "--num-evals", "2400")
    where = ("--teacher", teacher, "--out", str(out), "--workers", "2", "--wait-s", "60")
    with _running(network, "sample", *where, *sizes) as job:
        shards = out / "shards"
        _until(job, lambda: len(list(shards.glob("*.parquet"))) >= 6)
        network.hosts[2].cut_off()
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["rows"] == 160
    assert TrajectorySet.open(str(out)).verify().ok
    addresses = {event["node"] for event in _events(out, "shard")}
    assert addresses == {host.address for host in network.hosts[1:]}


def test_training_runs_across_hosts_and_goes_on_without_one_that_is_cut_off(
    network: Network, teacher: str, tmp_path: Path
) -> None:
    data, out = write_set(teacher, tmp_path / "set"), tmp_path / "run"
    where = ("--data", str(data), "--out", str(out), "--workers", "1:2", "--wait-s", "60")
    sizes = ("--batch-size", "64", "--threads", "1", "--schedule", "0,8", "--log-every", "1")
    often = ("--steps", "400", "--checkpoint-every", "25", "--step-timeout-s", "20")
    with _running(network, "distill", *where, *sizes, *often) as job:
        _until(job, lambda: len(list(out.glob("checkpoints-*/checkpoint_*"))) >= 1)
        network.hosts[2].cut_off()
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == list(range(1, 401))
    # It began with two workers, and went on from a checkpoint with one.
    (resumed,) = _events(out, "resumed")
    assert resumed["step"] >= 25


def _mounting(*arguments: object) -> list[str]:
    """What stands before a command that is to see a disk of its own somewhere."""
    mount = " ".join(map(str, arguments))
    return ["unshare", "--mount", "sh", "-c", f'mount {mount} && exec "$@"', "sh"]


def test_what_only_the_head_has_is_named_before_any_work(teacher: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copytree(teacher, mine / "teacher")
    package, older = Path(ddray.__file__).parent, tmp_path / "older"
    shutil.copytree(package, older)
    init = older / "__init__.py"
    init.write_text(init.read_text().replace(ddray.__version__, "0.0.9"))
    with _network() as network:
        node = network.hosts[1]
        network.nodes.append(network.add_node(node, *_mounting("-t", "tmpfs", "tmpfs", mine)))
        another = f"node {node.address}: {mine}/set is another folder there than on the driver's"
        for model, out, message in (
            (teacher, mine / "set", another),
            (mine / "teacher", tmp_path / "a", f"cannot read {mine}/teacher: no model"),
        ):
            flags = ("--teacher", str(model), "--out", str(out), "--wait-s", "60")
            with _running(network, "sample", *flags) as job:
                _, stderr = job.communicate(timeout=PATIENCE_S)
            assert job.returncode == 1, stderr
            assert message in stderr
            assert "Traceback" not in stderr
        other = network.hosts[2]
        network.nodes.append(network.add_node(other, *_mounting("--bind", older, package)))
        wait = ("--wait-s", "60", "--workers", "2", "--out", str(tmp_path / "b"))
        with _running(network, "sample", "--teacher", teacher, *wait) as job:
            _, stderr = job.communicate(timeout=PATIENCE_S)
        assert f"node {other.address}: ddray is 0.0.9 there and {ddray.__version__} here" in stderr
        with _running(network, "doctor", "--uri", str(mine)) as job:
            stdout, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 1
        assert f"{mine} is another folder there" in stdout
        assert "ddray is 0.0.9 there" in stdout

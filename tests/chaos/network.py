"""A Ray of hosts with addresses of their own: a head on the first, nodes on the others."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.hosts import Host, hosts
from tests.chaos.ray_head import BIN, RayHead, end, ray_head
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import command, environment

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

    def add_node(self, host: Host, *before: str, num_cpus: int = 1) -> subprocess.Popen[bytes]:
        """`ray start` on a host, after other commands if need be; it ends with the network."""
        command = [*host.enter, *before, str(BIN / "ray"), "start", "--block"]
        command += [f"--num-cpus={num_cpus}"]
        command += [f"--address={self.head.address}", f"--node-ip-address={host.address}"]
        command += ["--object-store-memory=104857600", "--disable-usage-stats"]
        with (self.head.folder / f"{host.namespace}.log").open("wb") as log:
            node = subprocess.Popen(
                command,
                env=self.head.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

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


@contextlib.contextmanager
def ray_network(number: int = 3) -> Iterator[Network]:
    """A head without CPUs on the first of so many hosts; what nodes are added end with it.

    The machine's disk is what they share.
    """
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts(number))
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
def running(network: Network, *arguments: str) -> Iterator[subprocess.Popen[str]]:
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


def events(out: Path, event: str) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def until(job: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    wait_until(condition, "what is waited for", lambda: job.poll() is None, job.communicate)

"""A Ray of hosts with addresses of their own: a head on the first, nodes on the others."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.hosts import Host, hosts
from tests.chaos.job import json_lines
from tests.chaos.ray_head import BIN, RayHead, end, ray_head
from tests.patience import PATIENCE_S, wait_until
from tests.processes import kill_with_children
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

    def add_node(
        self, host: Host, *before: str, num_cpus: int = 1, flags: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """`ray start` on a host, after other commands if need be; it ends with the network."""
        command = [*host.enter, *before, str(BIN / "ray"), "start", "--block"]
        command += [f"--num-cpus={num_cpus}"]
        command += [f"--address={self.head.address}", f"--node-ip-address={host.address}"]
        command += ["--object-store-memory=104857600", "--disable-usage-stats", *flags]
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


def head_on(host: Host, *flags: str, **others: Any) -> AbstractContextManager[RayHead]:
    """A head without CPUs there, which soon sees that a host is lost."""
    # Collectives find each other by the address of a card, not by the machine's name.
    names = {**_QUICK, "GLOO_SOCKET_IFNAME": "eth0"}
    names |= others
    return ray_head(*flags, num_cpus=0, ip=host.address, prefix=host.enter, **names)


@contextlib.contextmanager
def ray_network(number: int = 3) -> Iterator[Network]:
    """A head on the first of so many hosts; what nodes are added end with it.

    The machine's disk is what they share.
    """
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts(number))
        head = stack.enter_context(head_on(made[0]))
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
            kill_with_children(job.pid)
            job.communicate(timeout=PATIENCE_S)


def until(job: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    wait_until(condition, "what is waited for", lambda: job.poll() is None, job.communicate)


_CLIENT = """
import itertools, json, pathlib, sys, time, httpx
log, stop, *urls = open(sys.argv[1], "w", buffering=1), pathlib.Path(sys.argv[2]), *sys.argv[3:]
with httpx.Client(trust_env=False, timeout=120) as client:
    for seed, url in zip(itertools.count(), itertools.cycle(urls)):
        if stop.exists():
            break
        try:
            answer = client.post(url, json={"prompt": seed % 10, "seed": seed})
            told = "answered" if answer.status_code == 200 else answer.text
        except httpx.HTTPError as error:
            told = repr(error)
            time.sleep(0.1)
        print(json.dumps(told), file=log)
"""


@contextlib.contextmanager
def asking(host: Host, folder: Path, *urls: str) -> Iterator[Callable[[], list[str]]]:
    """One request after the other from a host, of each address in turn.

    Gives a function: what became of each so far, "answered" or what was told in place of an image.
    """
    log, stop = folder / "told", folder / "stop"
    command = [*host.enter, sys.executable, "-c", _CLIENT, str(log), str(stop), *urls]
    client = subprocess.Popen(command)
    try:
        yield lambda: json_lines(log)
    finally:
        stop.touch()
        client.wait(timeout=PATIENCE_S)

"""Hosts with addresses of their own on one machine: network namespaces that share a switch."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

# Of the switch, which nothing outside these namespaces can reach.
_NETWORK = "10.77.0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        namespace: its name.
        address: its IPv4 address.
    """

    namespace: str
    address: str

    @property
    def enter(self) -> tuple[str, ...]:
        """What stands before a command that is to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def cut_off(self) -> None:
        """Pull its cable."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """So many hosts; the first one has the switch. Skips where they cannot be made."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and Debian's iproute2")
    made = [Host(f"ddray{os.getpid()}-{k}", f"{_NETWORK}.{k + 1}") for k in range(number)]
    first = made[0]
    try:
        try:
            for host in made:
                _ip("netns", "add", host.namespace)
                _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", first.namespace, "link", "add", "switch", "type", "bridge")
            _ip("-n", first.namespace, "addr", "add", f"{first.address}/24", "dev", "switch")
            _ip("-n", first.namespace, "link", "set", "switch", "up")
            for k, host in enumerate(made[1:], 1):
                port = f"port{k}"
                peer = ("peer", "name", "eth0", "netns", host.namespace)
                _ip("-n", first.namespace, "link", "add", port, "type", "veth", *peer)
                _ip("-n", first.namespace, "link", "set", port, "master", "switch", "up")
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
                _ip("-n", host.namespace, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)

"""A client without a token, who tries every door that the processes of a command have open."""

import http.client
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import grpc
import psutil
from ray.core import generated

_TIMEOUT_S = 20.0
# What a client is told at a door that is closed, not there, or of another house.
_CLOSED = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
}
_REFUSED = (401, 403, 404, 405)
_HARMLESS = ("InternalKVKeys", "GetNodeStats", "GetCoreWorkerStats")
_HTTP = (
    ("POST", "/get_or_create_runtime_env"),
    ("POST", "/delete_runtime_env_if_possible"),
    ("POST", "/get_runtime_envs_info"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/api/job_agent/jobs/1/logs"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/jobs/"),
    ("GET", "/logs/"),
    ("GET", "/"),
)


@dataclass(frozen=True)
class Door:
    """A socket that listens.

    Attributes:
        host: the address at which it listens.
        port: likewise.
        process: whose it is, for people.
    """

    host: str
    port: int
    process: str = field(default="", compare=False)  # Ray's workers change their titles

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "::1")

    @property
    def address(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def doors(pid: int) -> set[Door]:
    """Every listening socket of a process and of all that it has started."""
    found = set()
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    for process in tree:
        try:
            name = " ".join(process.cmdline())[:80].strip()
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add(Door(socket.laddr.ip, socket.laddr.port, name))
        except psutil.Error:
            continue
    return found


@cache
def methods() -> tuple[str, ...]:
    """Every remote procedure that Ray has, as /package.Service/Method."""
    found = set()
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2_grpc"):
            source = inspect.getsource(importlib.import_module(f"ray.core.generated.{module.name}"))
            found |= set(re.findall(r"['\"](/ray\.[\w.]+/\w+)['\"]", source))
    return tuple(sorted(found))


def obeyed(door: Door) -> list[str]:
    """What a door does for a client without a token: names of procedures, and paths of HTTP."""
    return [*_procedures(door, methods(), None), *_paths(door)]


def known(door: Door, token: str) -> list[str]:
    """Of some procedures that change nothing, those that a door carries out for its own."""
    harmless = [name for name in methods() if name.rpartition("/")[2] in _HARMLESS]
    return [name for name in _procedures(door, harmless, token) if name.endswith("StatusCode.OK")]


def _procedures(door: Door, names: Sequence[str], token: str | None) -> Iterator[str]:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(door.address) as channel:
        calls = {
            name: channel.unary_unary(name).future(b"", timeout=_TIMEOUT_S, metadata=metadata)
            for name in names
        }
        for name, call in calls.items():
            if call.code() not in _CLOSED:
                yield f"{name}: {call.code()}"


def _paths(door: Door) -> Iterator[str]:
    for method, path in _HTTP:
        connection = http.client.HTTPConnection(door.address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body=b"{}" if method == "POST" else None)
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException):
            return  # it speaks no HTTP
        finally:
            connection.close()
        # Prometheus reads its numbers of whoever asks, at every path.
        if answer.status not in _REFUSED and not (method == "GET" and said.startswith(b"# HELP")):
            yield f"{method} {path}: {answer.status}"

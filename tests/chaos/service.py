"""The real `ddray serve` in a process group of its own, seen from outside, and clients for it."""

import asyncio
import contextlib
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.job import Job
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE_S, wait_until
from tests.processes import suspended

FULL, RAW = "/v1/images/generations", "/v1/images/raw"


_REPLICA = "ray::ServeReplica:ddray:students"


@contextlib.contextmanager
def standing_still(job: Job) -> Iterator[None]:
    """Within, the device of a service of one replica makes no image."""
    # On a busy machine a device that stands still may have lasted so long that another replaces it.
    wait_until(lambda: len(job.workers(_REPLICA)) == 1, "single replica")
    (replica,) = job.workers(_REPLICA)
    with suspended(replica):
        yield


class Service:
    """`ddray serve` with the bundled student."""

    def __init__(self, *arguments: str):
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        ports = ("--port", str(self.port), "--metrics-port", str(self.metrics_port))
        self._state = tempfile.TemporaryDirectory(prefix="ddray-state-")  # where its log stays
        self.job = Job("serve", *ports, *arguments, XDG_STATE_HOME=self._state.name)

    def until_ready(self) -> None:
        """Wait for the first answer of a warm student."""
        running = self.job.process
        wait_until(
            lambda: is_ready(self.url),
            "answer",
            lambda: running.poll() is None,
            running.communicate,
        )

    def replicas(self) -> list[psutil.Process]:
        """Processes of the students, the oldest first."""
        return self._processes(_REPLICA)

    def ingress(self) -> psutil.Process:
        """The process that checks requests."""
        return self._processes("ray::ServeReplica:ddray:ingress")[0]

    def proxies(self) -> list[psutil.Process]:
        """The processes that take connections."""
        return self._processes("ray::ProxyActor")

    def processes(self) -> list[psutil.Process]:
        """All through which requests go."""
        return [*self.proxies(), self.ingress(), *self.replicas()]

    def _processes(self, title: str) -> list[psutil.Process]:
        return sorted(self.job.workers(title), key=lambda process: process.create_time())

    def started(self) -> int:
        """Replicas that have ever become warm; their log says so."""
        return sum(
            log.read_text("utf-8", "replace").count("warmed up in")
            for log in self._logs.glob("replica_ddray_students_*.log")
        )

    def accesses(self) -> list[dict[str, Any]]:
        """What the access log holds of image requests."""
        lines = "".join(
            log.read_text("utf-8", "replace")
            for log in self._logs.glob("replica_ddray_ingress_*.log")
        ).splitlines()
        found = [json.loads(line[line.index("{") :]) for line in lines if '{"request_id"' in line]
        return [access for access in found if access["path"] in (FULL, RAW)]

    @cached_property
    def _logs(self) -> Path:
        """Folder of Serve's logs; found once, for it outlives whatever names it."""
        for process in self.job.workers("--session_dir="):
            for part in process.cmdline():
                if part.startswith("--session_dir="):
                    return Path(part.partition("=")[2]) / "logs" / "serve"
        raise AssertionError("no process names its session folder")

    def metrics(self) -> str:
        """What Prometheus gets; Ray brings it up to date every ten seconds."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        return httpx.get(url, timeout=PATIENCE_S, trust_env=False).text

    def total(self, name: str) -> float:
        """Sum of all series of a metric."""
        series = re.findall(rf"^{name}\{{.*\}} (\S+)$", self.metrics(), re.MULTILINE)
        return sum(map(float, series))

    def client(self) -> httpx.AsyncClient:
        """Waits longer than the service ever does, so that every failure is the service's own."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        return httpx.AsyncClient(
            base_url=self.url, timeout=PATIENCE_S, limits=limits, trust_env=False
        )


@dataclass
class Load:
    """What clients have seen."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    images: int = 0
    in_flight: int = 0

    async def ask(self, client: httpx.AsyncClient, **body: Any) -> httpx.Response | None:
        """Send one request and note what becomes of it; None = no answer."""
        began = time.monotonic()
        self.in_flight += 1
        answer = None
        try:
            answer = await client.post(FULL, json=body)
            status = str(answer.status_code)
        except httpx.HTTPError as error:
            # Half an answer is worse than none.
            status = "cut" if "incomplete" in str(error) else type(error).__name__
        finally:
            self.in_flight -= 1
        self.statuses[status] += 1
        self.seconds.setdefault(status, []).append(time.monotonic() - began)
        if answer is not None and answer.status_code == 200:
            # A cut answer would be no JSON, and a short one would lack images.
            assert len(answer.json()["data"]) == body["n"]
            self.images += int(body["n"])
        else:
            text = "" if answer is None else answer.text[:300]
            self.failures.append(f"{status} after {time.monotonic() - began:.1f} s: {text}")
        return answer

    def slowest(self) -> float:
        """Seconds of the slowest request."""
        return max(s for seconds in self.seconds.values() for s in seconds)


@contextlib.asynccontextmanager
async def clients(service: Service, count: int, n: int, pause_s: float = 0) -> AsyncIterator[Load]:
    """Clients that each send one request after another, until the block ends.

    Args:
        service: where to.
        count: of the clients.
        n: images of a request.
        pause_s: of a client between an answer and its next request.
    """
    load, stop = Load(), asyncio.Event()

    async def run(http: httpx.AsyncClient, k: int) -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            await load.ask(http, prompt=k % 10, n=n, seed=seed)
            await asyncio.sleep(pause_s)

    async with service.client() as http:
        tasks = [asyncio.create_task(run(http, k)) for k in range(count)]
        try:
            yield load
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def until(condition: Any, what: str, timeout_s: float = PATIENCE_S) -> float:
    """Wait for a condition that may become true; returns the seconds that it took."""
    began = time.monotonic()
    while not await asyncio.to_thread(condition):
        assert time.monotonic() - began < timeout_s, f"in {timeout_s:g} s there was no {what}"
        await asyncio.sleep(0.2)
    return time.monotonic() - began

"""A cluster of hosts with addresses of their own, of which one is cut off."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddray.shards import TrajectorySet
from tests.chaos.hosts import Host, hosts
from tests.chaos.job import write_set
from tests.chaos.ray_head import BIN, RayHead, end, ray_head
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
    """A head on the first host, and a node on each of the others."""

    head: RayHead
    hosts: list[Host]

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
    with contextlib.ExitStack() as stack:
        first, *others = stack.enter_context(hosts(3))
        # Collectives find each other by the address of a card, not by the machine's name.
        names = {**_QUICK, "GLOO_SOCKET_IFNAME": "eth0"}
        head = stack.enter_context(
            ray_head(num_cpus=0, ip=first.address, prefix=first.enter, **names)
        )
        for host in others:
            started = [*host.enter, str(BIN / "ray"), "start", "--block", "--num-cpus=1"]
            started += [f"--address={head.address}", f"--node-ip-address={host.address}"]
            started += ["--object-store-memory=104857600", "--disable-usage-stats"]
            with (head.folder / f"{host.namespace}.log").open("wb") as log:
                node = subprocess.Popen(
                    started,
                    env=head.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            stack.callback(end, node)
        yield Network(head, [first, *others])


@pytest.fixture
def running(network: Network) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    jobs: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        jobs.append(network.start(*arguments))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.poll() is None:
            for process in (*psutil.Process(job.pid).children(recursive=True), job):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            job.communicate(timeout=60)


def _events(out: Path, event: str) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def _until(job: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "the job does not get that far"
        time.sleep(0.1)


def test_sampling_runs_across_hosts_and_survives_one_that_is_cut_off(
    network: Network,
    running: Callable[..., subprocess.Popen[str]],
    teacher: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "set"
    sizes = ("--count", "160", "--shard-rows", "8", "--batch-size", "8", "--num-evals", "2400")
    job = running(
        "sample",
        "--teacher",
        teacher,
        "--out",
        str(out),
        *sizes,
        "--workers",
        "2",
        "--wait-s",
        "60",
    )
    shards = out / "shards"
    _until(job, lambda: len(list(shards.glob("*.parquet"))) >= 6)
    network.hosts[2].cut_off()
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["rows"] == 160
    assert TrajectorySet.open(str(out)).verify().ok
    addresses = {event["node"] for event in _events(out, "shard")}
    assert addresses == {host.address for host in network.hosts[1:]}


def test_training_runs_across_hosts_and_goes_on_without_one_that_is_cut_off(
    network: Network,
    running: Callable[..., subprocess.Popen[str]],
    teacher: str,
    tmp_path: Path,
) -> None:
    data, out = write_set(teacher, tmp_path / "set"), tmp_path / "run"
    where = ("--data", str(data), "--out", str(out))
    sizes = ("--batch-size", "64", "--threads", "1", "--schedule", "0,8", "--log-every", "1")
    often = ("--checkpoint-every", "50", "--step-timeout-s", "20", "--wait-s", "60")
    job = running("distill", *where, *sizes, *often, "--steps", "1200", "--workers", "1:2")
    metrics = out / "metrics.jsonl"
    _until(job, lambda: len(list(out.glob("checkpoints-*/checkpoint_*"))) >= 1)
    network.hosts[2].cut_off()
    stdout, stderr = job.communicate(timeout=400)
    assert job.returncode == 0, stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 1201))
    begun = _events(out, "resumed") or _events(out, "restarted")
    assert begun, os.listdir(out)

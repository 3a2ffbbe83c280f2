"""Shared by the chaos tests: jobs, a cluster, a teacher, a small disk."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from playwright.sync_api import Browser, sync_playwright
from ray.cluster_utils import Cluster

from tests.chaos.job import Job
from tests.chaos.page import CHROMIUM, Visit
from tests.chaos.service import Service
from tests.runtime.tiny import write_teacher


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Start a job; whatever a failed test leaves running is ended."""
    jobs: list[Job] = []

    def begin(*arguments: str, **variables: str) -> Job:
        jobs.append(Job(*arguments, **variables))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end_by_force()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Service]]:
    """Start a service; whatever a failed test leaves running is ended."""
    services: list[Service] = []

    def begin(*arguments: str) -> Service:
        services.append(Service(*arguments))
        services[-1].until_ready()
        return services[-1]

    yield begin
    for service in services:
        service.job.end_by_force()


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A head of one CPU, or as many as the parameter says, to which this process is connected."""
    # Not tmp_path: the names of Ray's sockets below it would be too long.
    temp_dir = tempfile.mkdtemp(prefix="ddr", dir="/tmp")
    # There Cluster notes its address, wherever its own folder is, and does not make the folder.
    Path("/tmp/ray").mkdir(exist_ok=True)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": getattr(request, "param", 1),
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
            "temp_dir": temp_dir,
        },
    )
    ray.init(address=cluster.address, logging_level="fatal", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few shards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    with sync_playwright() as playwright:
        # The sandbox of Chromium does not run as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Callable[..., Visit]]:
    """Open tabs of the module's service, which end with the test."""
    visits: list[Visit] = []

    def begin(**options: Any) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield begin
    for each in visits:
        each.page.context.close()

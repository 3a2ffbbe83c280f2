"""Shared by the chaos tests: jobs, a teacher, a small disk."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.job import Job
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
        if job.process.poll() is None:
            for process in (*job.tree(), psutil.Process(job.process.pid)):
                process.kill()
            job.process.communicate(timeout=60)


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

"""Trajectory sets on an S3 service that fails: what is retried, what is told, what is left."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from ddray.errors import StorageError
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from tests.patience import PATIENCE_S
from tests.runtime.tiny import command, contents, environment, sampling, write_teacher
from tests.s3_server import BUCKET, FaultyProxy, s3_environment, s3_server

pytestmark = pytest.mark.chaos

SIZES: dict[str, Any] = {"count": 60, "shard_rows": 5, "batch_size": 5, "workers": (2, 2)}


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A service of its own behind a proxy, to which the environment points."""
    with s3_server() as endpoint, FaultyProxy(endpoint) as proxy:
        for name, value in s3_environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    """A prefix for this test: moto's servers of one process share their objects."""
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def _sample(teacher: str, out: str, **other: Any) -> subprocess.Popen[str]:
    config = sampling(teacher, Path("unused"), **{**SIZES, **other}).model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in {**config, "out": out}.items()]
    arguments = [part for setting in settings for part in ("--set", setting)]
    return subprocess.Popen(
        command("sample", *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _client() -> Any:
    return boto3.session.Session().client("s3")


@pytest.mark.smoke
def test_errors_resets_lost_answers_and_slow_ones_are_retried(proxy: FaultyProxy, uri: str) -> None:
    proxy.every = 2  # every other request, so that a retry may fail too
    assert open_storage(uri).write("large", bytes(70 * 2**20))  # in parts
    assert open_storage(uri).read("large") == bytes(70 * 2**20)
    storage = open_storage(uri)
    for i in range(10):
        name = f"shards/{i}"
        assert storage.write(name, bytes([i]) * 1000)
        assert storage.read(name) == bytes([i]) * 1000
    assert len(storage.list("shards/")) == 10
    assert {"500", "503", "reset", "lost answer", "half an answer", "slow"} <= set(proxy.faults)


def test_expired_credentials_are_named_and_not_retried_for_long(
    proxy: FaultyProxy, uri: str
) -> None:
    proxy.refuse = "ExpiredToken"
    with pytest.raises(StorageError, match="the credentials are refused; renew them"):
        open_storage(uri).read("manifest.json")


@pytest.mark.smoke
def test_a_set_made_through_faults_is_byte_identical_to_one_made_without(
    proxy: FaultyProxy, uri: str, teacher: str, tmp_path: Path
) -> None:
    stdout, stderr = _sample(teacher, str(tmp_path / "set")).communicate(timeout=PATIENCE_S)
    proxy.every = 4
    job = _sample(teacher, uri)
    stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert json.loads(stdout)["rows"] == SIZES["count"]
    assert len(proxy.faults) >= 5, proxy.faults
    proxy.every = 0
    storage = open_storage(uri)
    there = {name: storage.read(name) for name in storage.list("shards/")}
    assert there == contents(tmp_path / "set", "shards")
    assert TrajectorySet.open(uri).verify().ok


def test_a_bucket_that_vanishes_ends_the_run_in_one_line(
    proxy: FaultyProxy, uri: str, teacher: str
) -> None:
    job = _sample(teacher, uri, num_evals=2400, count=400)
    storage = open_storage(uri)
    while len(storage.list("shards/")) < 2:
        assert job.poll() is None, job.communicate()
    # From here on the bucket is gone for whoever asks.
    proxy.refuse = "NoSuchBucket"
    stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("ddray: error: cannot write s3://")
    assert stderr.splitlines()[-1].endswith("no such bucket; create it, or correct the URI")

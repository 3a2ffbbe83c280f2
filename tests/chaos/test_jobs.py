"""Jobs submitted to a cluster as users do it: every stage, stopped and submitted again."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ddray.images import ImageSet
from ddray.shards import TrajectorySet
from tests.chaos.ray_head import RayHead, answers, free_port, ray_head

pytestmark = pytest.mark.chaos

_SMALL = ("--count", "200", "--shard-rows", "50", "--set", "batch_size=50")


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


def _until(head: RayHead, job: str, condition: object) -> None:
    deadline = time.monotonic() + 150
    while not condition():  # type: ignore[operator]
        assert head.status(job) in ("PENDING", "RUNNING"), head.job("logs", job)
        assert time.monotonic() < deadline, head.job("logs", job)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def made(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set and a student, each made by a job."""
    runs = tmp_path_factory.mktemp("runs")
    _, printed = head.submit(*_job("sample", *_SMALL, "--out", runs / "set"))
    assert "succeeded" in printed, printed
    unpacked = head.folder.glob("session_latest/runtime_resources/working_dir_files/*/**/*")
    assert 1e3 < sum(file.stat().st_size for file in unpacked) < 1e6
    assert "ddray 0.1.0 from " in printed
    assert '"rows_made": 200' in printed
    flags = ("--data", runs / "set", "--out", runs / "run", "--steps", 20)
    log = _succeeds(head, "distill", *flags, "--set", "checkpoint_every=10", "--evaluate-every", 0)
    assert '"steps": 20' in log
    return runs


def test_the_cluster_answers_nobody_without_the_token(head: RayHead) -> None:
    assert answers(f"{head.dashboard}/api/jobs/") == 401
    assert answers(f"{head.dashboard}/api/jobs/", head.environment["RAY_AUTH_TOKEN"]) == 200


def test_a_set_and_a_student_are_made_by_jobs(made: Path) -> None:
    assert TrajectorySet.open(str(made / "set")).verify().ok
    assert (made / "run" / "student" / "model.safetensors").is_file()


def test_images_and_their_evaluation_are_made_by_jobs(head: RayHead, made: Path) -> None:
    student = ("--student", made / "run" / "student")
    log = _succeeds(head, "generate", *student, *_SMALL, "--out", made / "images")
    assert '"rows_made": 200' in log
    assert ImageSet.open(str(made / "images")).verify().ok
    small = ("--count", 100, "--speed-seconds", 0.05, "--transport-count", 10, "--threads", 1)
    log = _succeeds(
        head, "evaluate", *student, "--data", made / "set", "--out", made / "report", *small
    )
    assert "student, 1 step" in log
    assert (made / "report" / "report.html").is_file()


def test_a_student_is_served_by_a_job_until_it_is_stopped(head: RayHead, made: Path) -> None:
    port = free_port()
    student = ("--student", made / "run" / "student", "--port", port)
    job, _ = head.submit(*_job("serve", *student), wait=False)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:

        def ready() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        _until(head, job, ready)
        image = client.post("/v1/images/raw", json={"prompt": 7, "seed": 1})
        assert image.content.startswith(b"\x89PNG")
        head.job("stop", job)
        assert head.until(job, "STOPPED", "FAILED") == "STOPPED"
        with pytest.raises(httpx.TransportError):
            client.get("/readyz")


def test_sampling_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, tmp_path: Path
) -> None:
    flags = (*_SMALL, "--set", "num_evals=1200", "--out", tmp_path / "set")
    job, _ = head.submit(*_job("sample", *flags), wait=False)
    _until(head, job, lambda: len(list((tmp_path / "set" / "shards").glob("*.parquet"))) >= 1)
    head.job("stop", job)
    assert head.until(job, "STOPPED", "FAILED") == "STOPPED"
    there = len(list((tmp_path / "set" / "shards").glob("*.parquet")))
    assert there < 4, "it was done before it could be stopped"
    log = _succeeds(head, "sample", *flags)
    assert f"found {there} of 4 shards" in log
    assert TrajectorySet.open(str(tmp_path / "set")).verify().ok


def test_training_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: RayHead, made: Path, tmp_path: Path
) -> None:
    flags = ("--data", made / "set", "--out", tmp_path / "run", "--steps", 400)
    flags = (*flags, "--log-every", 1, "--checkpoint-every", 50, "--evaluate-every", 0)
    job, _ = head.submit(*_job("distill", *flags), wait=False)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def steps() -> list[int]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines]

    _until(head, job, lambda: max(steps(), default=0) >= 20)
    head.job("stop", job)
    # The driver says by its status that it was told to end and has left a checkpoint.
    assert head.until(job, "STOPPED", "FAILED") == "STOPPED"
    assert "a rerun goes on from there" in head.job("logs", job)
    before = max(steps())
    assert before < 400
    log = _succeeds(head, "distill", *flags)
    assert '"steps": 400' in log
    assert sorted(set(steps())) == list(range(1, 401))
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    resumed = [e for e in map(json.loads, events) if e["event"] == "resumed"]
    assert resumed, events


def test_the_pipeline_makes_all_of_it_with_training_beside_sampling(
    head: RayHead, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    (jobs / "configs").mkdir(parents=True)
    scripts = Path(__file__).parents[2] / "jobs"
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--out", "runs/set"), "lies in the working directory, which Ray deletes after the job"),
        (("--workers", "9"), "asks for 9 workers of 1 CPUs and 0 GPUs, but the cluster has room"),
        (("--node-pool", "spot"), "on nodes with the label ddray.io/node-pool=spot, but"),
        (("--teacher", "/nowhere"), "no model '/nowhere'"),
        (("--out", "/proc/set"), "cannot write to /proc/set"),
    ],
)
def test_a_job_that_cannot_work_fails_in_one_line(
    head: RayHead, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    job, _ = head.submit(*_job("sample", "--out", tmp_path / "set", *flags))
    assert head.status(job) == "FAILED"
    log = head.job("logs", job)
    assert message in log
    assert "Traceback" not in log


def test_a_client_without_the_token_is_told_so(head: RayHead, tmp_path: Path) -> None:
    import subprocess

    from tests.chaos.ray_head import BIN

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
            timeout=200,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "ddray: error: cannot connect to Ray at RAY_ADDRESS=" in done.stderr
        assert "token" in done.stderr
        assert "Traceback" not in done.stderr

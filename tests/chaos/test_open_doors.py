"""Nobody but itself is obeyed by the Ray that a command starts, whichever command it is."""

import contextlib
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.chaos.job import Job
from tests.chaos.ray_head import ray_head
from tests.chaos.service import Service
from tests.chaos.stranger import Door, doors, known, obeyed
from tests.patience import PATIENCE_S
from tests.runtime.tiny import command

pytestmark = pytest.mark.chaos

FOR_EVER = "1000000"
# What must have come up before a verb is said to have no more doors. (`evaluate` starts no Ray.)
VERBS = {
    "sample": ("ray::MapWorker", ("--count", FOR_EVER)),
    "generate": ("ray::MapWorker", ("--count", FOR_EVER)),
    "distill": (
        "ray::RayTrainWorker",
        ("--steps", FOR_EVER, "--batch-size", "16", "--workers", "2"),
    ),
    "quickstart": ("ray::MapWorker", ("--preset", "tiny")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sets") / "set")
    arguments = ("--count", "40", "--shard-rows", "40", "--set", "num_evals=2", "--out", folder)
    status, _, stderr = Job("sample", *arguments).end()
    assert status == 0, stderr
    return folder


def _token(job: Job) -> str:
    """What the processes of a command show each other."""
    found: set[str] = set()
    for process in job.tree():
        with contextlib.suppress(psutil.Error):
            found |= {process.environ().get("RAY_AUTH_TOKEN", "")} - {""}
    assert len(found) == 1, "one token for all of a run"
    return found.pop()


def _tried(job: Job, title: str) -> dict[Door, list[str]]:
    """Every door of a running command, tried until what it needs is up and no other opens."""
    tried: dict[Door, list[str]] = {}

    def all_tried() -> bool:
        is_up = bool(job.workers(title))
        new = doors(job.process.pid) - tried.keys()
        for door in new:
            tried[door] = obeyed(door)
        return is_up and not new

    job.until(all_tried)
    return tried


@pytest.mark.parametrize("verb", [*VERBS, pytest.param("serve", marks=pytest.mark.smoke)])
def test_a_stranger_is_obeyed_at_no_door(verb: str, data: str, tmp_path: Path) -> None:
    if verb == "serve":
        service = Service()
        job, title, own = service.job, "ray::ServeReplica", service.port
        service.until_ready()
    else:
        title, arguments = VERBS[verb]
        needs = ("--data", data) if verb == "distill" else ()
        # Whatever is said to clients of clusters.
        job = Job(
            verb, *arguments, *needs, "--out", str(tmp_path / "out"), RAY_AUTH_MODE="disabled"
        )
        own = 0
    try:
        tried = _tried(job, title)
        token = _token(job)
        carried_out = "".join(name for door in tried for name in known(door, token))
    finally:
        job.process.send_signal(signal.SIGINT)
        job.end()
    obeys = {door: what for door, what in tried.items() if what and door.port != own}
    assert not obeys
    for name in ("InternalKVKeys", "GetNodeStats", "GetCoreWorkerStats"):
        assert name in carried_out, f"no door of {verb} would know its own by {name}"


def test_a_token_is_written_to_no_file_and_no_command_line(tmp_path: Path) -> None:
    job = Job("sample", "--count", FOR_EVER, "--out", str(tmp_path / "set"))
    try:
        job.until(lambda: bool(job.workers("ray::MapWorker")))
        token = _token(job)
        lines = [part for process in job.tree() for part in _command_line(process)]
        (session,) = {found[1] for line in lines if (found := re.match("--session_dir=(.*)", line))}
        files = [path for path in Path(session).parent.rglob("*") if path.is_file()]
        assert not [line for line in lines if token in line]
        assert files
        assert not [path for path in files if token.encode() in path.read_bytes()]
    finally:
        job.process.send_signal(signal.SIGINT)
        job.end()


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_doctor_calls_an_open_cluster_an_error() -> None:
    with ray_head(RAY_AUTH_MODE="disabled") as head:
        done = subprocess.run(
            command("doctor"),
            env={**head.environment, "RAY_ADDRESS": head.address},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.returncode == 1, done.stderr
    assert "ERROR it asks for no token: whoever reaches its ports runs code" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 errors")

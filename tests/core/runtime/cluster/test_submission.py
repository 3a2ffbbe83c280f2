"""A job that was lost is submitted again, one that failed is not: Ray's client and a small server.

The server answers as a head's dashboard does; what one says of a lost job was seen on a real one.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from ddray.cli import main
from ddray.errors import ClusterError, ConfigError
from ddray.runtime.cluster import submission
from ddray.runtime.cluster.submission import submit

RUNNING = {"status": "RUNNING"}
SUCCEEDED = {"status": "SUCCEEDED", "driver_exit_code": 0}
STOPPED = {"status": "STOPPED"}
LOST = {
    "status": "FAILED",
    "error_type": "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "message": "Unexpected error occurred: failed to get job supervisor.",
}
DIED = LOST | {"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "Job supervisor actor died"}
FAILED = {
    "status": "FAILED",
    "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR",
    "driver_exit_code": 2,
    "message": "Job entrypoint command failed with exit code 2, last available logs:\n"
    "ddray: error: steps=0 must be a positive integer\n",
}
KILLED = FAILED | {"driver_exit_code": -9}
NO_ENVIRONMENT = {
    "status": "FAILED",
    "error_type": "RUNTIME_ENV_SETUP_FAILURE",
    "message": "runtime_env setup failed: no such package",
}
# The head is another, which knows of no job.
FORGOTTEN: dict[str, Any] = {}


class Head(BaseHTTPRequestHandler):
    """The jobs API of a dashboard; a job is running when it is first looked at."""

    server: "Dashboard"

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": ""})
        elif self.path == "/api/jobs/":
            self._answer(200, self.server.look())
        else:
            self._answer(200 if self.path in self.server.packages else 404, None)

    def do_PUT(self) -> None:
        self.server.packages[self.path] = self._read()
        self._answer(200, None)

    def do_POST(self) -> None:
        request = json.loads(self._read())
        if self.server.refusals:
            self.server.refusals -= 1
            self._answer(500, "No available agent to submit job, please try again later.")
            return
        self.server.submitted.append(request)
        self.server.jobs[request["submission_id"]] = RUNNING
        name = request["submission_id"]
        self._answer(200, {"job_id": name, "submission_id": name})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Dashboard(ThreadingHTTPServer):
    """What a head remembers, and what will become of the jobs that it takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Head, bind_and_activate=False)
        self.server_bind()
        self.fates: list[dict[str, Any]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.packages: dict[str, bytes] = {}
        self.refusals = 0

    def look(self) -> list[dict[str, Any]]:
        told = [
            {"type": "SUBMISSION", "submission_id": name, "entrypoint": "true", **job}
            for name, job in self.jobs.items()
        ]
        for name in [name for name, job in self.jobs.items() if job == RUNNING]:
            self.jobs[name] = self.fates.pop(0)
            if self.jobs[name] == FORGOTTEN:
                self.jobs.clear()
        return told

    def start(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    """Not yet listening."""
    server = Dashboard()
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "sample.py").write_text("print('sampled')")
    return str(tmp_path)


def submitted(folder: str, **settings: Any) -> str:
    return submit(["python", "sample.py"], "var", folder, look_every_s=0.01, **settings)


@pytest.mark.parametrize(
    ("fates", "names"),
    [
        ([SUCCEEDED], ["var"]),
        ([LOST, SUCCEEDED], ["var", "var-2"]),
        ([DIED, KILLED, SUCCEEDED], ["var", "var-2", "var-3"]),
        ([FORGOTTEN, SUCCEEDED], ["var", "var"]),
        ([LOST, FORGOTTEN, LOST, SUCCEEDED], ["var", "var-2", "var", "var-2"]),
    ],
)
def test_a_lost_job_is_submitted_until_it_succeeds(
    dashboard: Dashboard, folder: str, fates: list[dict[str, Any]], names: list[str]
) -> None:
    dashboard.fates = [*fates]
    dashboard.start()
    assert submitted(folder) == names[-1]
    assert [one["submission_id"] for one in dashboard.submitted] == names
    for request in dashboard.submitted:
        assert request["entrypoint"] == "python sample.py"
        assert request["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    (package,) = dashboard.packages.values()
    assert b"sample.py" in package


@pytest.mark.parametrize(
    ("fates", "told"),
    [
        ([FAILED], "var failed by itself, .*: ddray: error: steps=0 must be a positive integer; "),
        ([LOST, FAILED], "var-2 failed by itself"),
        ([NO_ENVIRONMENT], "var failed by itself, .*: runtime_env setup failed: no such package"),
        ([STOPPED], "var was stopped; submit it again to go on"),
        ([LOST, FORGOTTEN, KILLED], "var was lost 3 times; look after the head"),
    ],
)
def test_other_ends_are_ends(
    dashboard: Dashboard, folder: str, fates: list[dict[str, Any]], told: str
) -> None:
    dashboard.fates = [*fates]
    dashboard.start()
    with pytest.raises(ClusterError, match=told):
        submitted(folder, most_lost=2)
    assert len(dashboard.submitted) == len(fates)


@pytest.mark.parametrize(
    ("before", "names", "succeeded"),
    [
        ([FAILED], ["var-2"], "var-2"),
        ([LOST, STOPPED], ["var-3"], "var-3"),
        ([RUNNING], [], "var"),
        ([LOST, SUCCEEDED], [], "var-2"),
    ],
)
def test_the_cluster_remembers_what_was_before(
    dashboard: Dashboard,
    folder: str,
    before: list[dict[str, Any]],
    names: list[str],
    succeeded: str,
) -> None:
    dashboard.jobs = dict(zip(["var", "var-2"], before, strict=False)) | {"another": FAILED}
    dashboard.fates = [SUCCEEDED]
    dashboard.start()
    assert submitted(folder) == succeeded
    assert [one["submission_id"] for one in dashboard.submitted] == names


def test_a_head_that_is_away_or_not_ready_is_waited_for(
    dashboard: Dashboard, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.fates, dashboard.refusals = [LOST, SUCCEEDED], 3
    threading.Timer(0.1, dashboard.start).start()
    # Of the refusals none is a loss.
    assert submitted(folder, most_lost=1) == "var-2"
    told = capsys.readouterr().err
    assert told.count("nobody answers at RAY_ADDRESS; waiting for a head") == 1
    assert told.count("the head is not ready: Request failed with status code 500") == 1
    assert "var was lost: Unexpected error occurred: failed to get job supervisor." in told


def test_a_cluster_that_takes_nothing_is_told_of(
    dashboard: Dashboard, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_MOST_REFUSALS", 2)
    dashboard.refusals = 1000
    dashboard.start()
    with pytest.raises(ClusterError, match="takes no job: .*No available agent to submit job"):
        submitted(folder)


def test_wrong_use_is_refused_before_anything(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.start()
    with pytest.raises(ConfigError, match="working_dir='/nowhere' is no folder; give that of the"):
        submitted("/nowhere")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is not set; give the dashboard's"):
        submitted("/")
    words = ["cluster", "submit", "--submission-id", "var", "--working-dir", "/nowhere"]
    assert main([*words, "--", "python", "sample.py", "--config", "configs/x.yaml"]) == 2
    assert "working_dir='/nowhere' is no folder" in capsys.readouterr().err
    assert main(words) == 2
    assert "the following arguments are required: entrypoint" in capsys.readouterr().err

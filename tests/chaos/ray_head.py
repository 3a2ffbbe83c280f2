"""A cluster as `ray start --head` makes it; its dashboard takes jobs and asks for a token."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ddray.runtime.cluster.connection import CLUSTER_ENVIRONMENT
from tests.loopback import free_port
from tests.paths import ROOT
from tests.patience import PATIENCE_S, wait_until
from tests.processes import kill_with_children, suspended

BIN = Path(sys.executable).parent


@dataclass
class RayHead:
    """A head that runs.

    Attributes:
        address: of its GCS.
        dashboard: URL.
        environment: of whoever talks to it, with the token.
        process: `ray start --block`.
        folder: Ray's own.
    """

    address: str
    dashboard: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path

    def submit(
        self, *entrypoint: str, wait: bool = True, working_dir: Path = ROOT / "jobs"
    ) -> tuple[str, str]:
        """`ray job submit`; returns the job's id and what the command printed."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard]
        command += ["--working-dir", str(working_dir), *([] if wait else ["--no-wait"]), "--"]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            done = subprocess.run(
                [*command, *entrypoint],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            printed = done.stdout + done.stderr
            # The agent answers before the head knows of it.
            if "No available agent to submit job" not in printed or time.monotonic() > deadline:
                break
        found = re.search(r"Job '(raysubmit_\w+)' submitted", printed)
        assert found, printed
        return found[1], printed

    def stop_midway(self, job: str, title: str, begun: Callable[[], bool]) -> None:
        """Stop a job once it has begun; its workers stand still while the command takes its time.

        Args:
            job: its id.
            title: of the workers' processes.
            begun: whether there is something to go on from.
        """
        wait_until(begun, f"begin of {job}", lambda: self.process.poll() is None)
        workers = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if title in " ".join(process.cmdline())
        ]
        with suspended(*workers):
            self.job("stop", job, "--no-wait")

    def job(self, verb: str, job: str, *flags: str) -> str:
        """`ray job status`, `stop` or `logs`."""
        done = subprocess.run(
            [str(BIN / "ray"), "job", verb, "--address", self.dashboard, *flags, job],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return done.stdout + done.stderr

    def status(self, job: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        text = self.job("status", job)
        found = re.search(rf"[Jj]ob '{job}'(?::| was)? (\w+)", text)
        assert found, text
        return found[1].upper()

    def lose(self) -> None:
        """What a machine that loses its power does: nobody on it says goodbye."""
        kill_with_children(self.process.pid)

    def until(self, job: str, *wanted: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait for one of these states."""
        deadline = time.monotonic() + timeout_s
        while (state := self.status(job)) not in wanted:
            assert time.monotonic() < deadline, (state, self.job("logs", job))
            time.sleep(0.5)
        return state


@contextlib.contextmanager
def ray_head(
    *flags: str,
    num_cpus: int = 3,
    ip: str = "127.0.0.1",
    port: int | None = None,
    dashboard_port: int | None = None,
    prefix: Sequence[str] = (),
    **variables: str,
) -> Iterator[RayHead]:
    """A head for as long as the context lasts; it ends what it started, and nothing else.

    Args:
        flags: more of `ray start`.
        num_cpus: of the head's node.
        ip: at which it listens.
        port: of the GCS; None = a free one.
        dashboard_port: of the dashboard; None = a free one.
        prefix: of the command, such as one that enters a network namespace.
        variables: more of its environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="ddr", dir="/tmp"))  # short, for the paths of sockets
    port, dashboard, agent = port or free_port(), dashboard_port or free_port(), free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DDRAY_"))}
    environment = {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # jobs say `python`
        **CLUSTER_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A machine of many virtual addresses has no proxy for its own.
        "NO_PROXY": "*",
        "no_proxy": "*",
        **variables,
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}"]
    command += [f"--node-ip-address={ip}", f"--port={port}", f"--temp-dir={folder}"]
    command += [f"--dashboard-host={ip}", f"--dashboard-port={dashboard}"]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={free_port()}",
    ]
    command += ["--object-store-memory=104857600", "--disable-usage-stats", *flags]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, *command],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = RayHead(f"{ip}:{port}", f"http://{ip}:{dashboard}", environment, process, folder)
    try:
        # Jobs are given to the agent of a node, which comes up after the dashboard.
        for url in (
            f"{head.dashboard}/api/gcs_healthz",
            f"http://{ip}:{agent}/api/local_raylet_healthz",
        ):
            _until_up(head, url, prefix)
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _until_up(head: RayHead, url: str, prefix: Sequence[str]) -> None:
    probe = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert head.process.poll() is None, (head.folder / "head.log").read_text()
        command = [*prefix, sys.executable, "-c", probe, url]
        if subprocess.run(command, env=head.environment, capture_output=True).returncode == 0:
            return
        assert time.monotonic() < deadline, (head.folder / "head.log").read_text()
        time.sleep(0.5)


def answers(url: str, token: str | None = None) -> int:
    """Status of a GET."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def end(process: subprocess.Popen[bytes]) -> None:
    """End a `ray start --block` and all that it has started."""
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=6)
        for child in (*tree, *_session(process.pid)):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait(timeout=20)


def _session(leader: int) -> list[psutil.Process]:
    """Processes of the same session, whoever their parents are now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found

"""A job that is submitted again when it was lost, and not when it failed.

The driver of a job runs on the head and is gone with it. Sets and runs go on from what is written,
so what is missing is somebody who submits the job again: this, on the computer that it came from.
Its memory is the cluster's: the job is called NAME, and NAME-2, NAME-3 when it is begun again.
"""

import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ddray.errors import ClusterError, ConfigError, one_line

_LOOK_EVERY_S = 10.0
# What a head answers that is still coming up, before it is believed to mean it.
_MOST_REFUSALS = 30
# SIGKILL, to the driver or to the shell that Ray starts it by: as when memory is short.
_KILLED = (-9, 137)


def submit(
    entrypoint: Sequence[str],
    name: str,
    working_dir: str,
    most_lost: int = 10,
    look_every_s: float = _LOOK_EVERY_S,
) -> str:
    """Submit a job to the cluster at `RAY_ADDRESS`, and again when it is lost, until it succeeds.

    While nobody answers there, as when a head or the tunnel to it is gone, this waits. A job of the
    name that runs is watched; one that has succeeded stays so.

    Args:
        entrypoint: The command, in words.
        name: Submission id of the first attempt.
        working_dir: Folder that goes with it, as `ray job submit --working-dir` takes it.
        most_lost: How often the job may be lost before this gives up.
        look_every_s: Seconds between two looks at it.

    Returns:
        The submission id of the attempt that has succeeded.

    Raises:
        ConfigError: If the folder is none, or no cluster is named.
        ClusterError: If the job failed by itself, was stopped or was lost too often, or the cluster
            takes no job of ours.
    """
    if not Path(working_dir).is_dir():
        raise ConfigError(f"working_dir={working_dir!r} is no folder; give that of the job's files")
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("RAY_ADDRESS is not set; give the dashboard's, as http://127.0.0.1:8265")
    client: JobSubmissionClient | None = None
    begun, lost, refusals, told = False, 0, 0, ""
    while True:
        try:
            client = client or JobSubmissionClient()
            attempts = _attempts(client, name)
            latest = attempts[-1] if attempts else None
            if latest is not None and latest.status == JobStatus.SUCCEEDED:
                _say(f"{latest.submission_id} has succeeded")
                return str(latest.submission_id)
            if latest is None or latest.status.is_terminal():
                if begun:
                    lost += 1
                    _require_lost(latest, name, lost, most_lost)
                begun = False
                following = next(itertools.islice(_ids(name), len(attempts), None))
                client.submit_job(
                    entrypoint=shlex.join(entrypoint),
                    submission_id=following,
                    runtime_env={"working_dir": working_dir},
                )
                _say(f"submitted {following}; its log: ray job logs --follow {following}")
            begun, refusals, now = True, 0, ""
        except AuthenticationError as error:
            raise ClusterError(f"the cluster does not take our token: {one_line(error)}") from error
        except OSError as error:
            now = f"nobody answers at RAY_ADDRESS; waiting for a head: {one_line(error)}"
        except RuntimeError as error:
            refusals += 1
            if refusals > _MOST_REFUSALS:
                raise ClusterError(f"the cluster takes no job: {one_line(error)}") from error
            now = f"the head is not ready: {one_line(error)}"
        if now and now != told:
            _say(now)
        told = now
        time.sleep(look_every_s)


def was_lost(job: JobDetails) -> bool:
    """Whether the driver did not end by itself: its head is gone, or it was killed."""
    if job.status != JobStatus.FAILED:
        return False
    if job.driver_exit_code is None:
        # Of its supervisor, an actor on the head. Else the environment or the command was wrong.
        return (job.error_type or "").startswith("JOB_SUPERVISOR_ACTOR")
    return job.driver_exit_code in _KILLED


def _require_lost(job: JobDetails | None, name: str, lost: int, most_lost: int) -> None:
    if job is None:
        _say(f"the head knows nothing of {name}, as it would after a loss")
    elif was_lost(job):
        _say(f"{job.submission_id} was lost: {_lines(job)[0]}")
    elif job.status == JobStatus.STOPPED:
        raise ClusterError(f"{job.submission_id} was stopped; submit it again to go on")
    else:
        raise ClusterError(
            f"{job.submission_id} failed by itself, so it is not submitted again: "
            f"{_lines(job)[-1]}; `ray job logs {job.submission_id}` has the rest"
        )
    if lost > most_lost:
        raise ClusterError(f"{name} was lost {lost} times; look after the head, then submit again")


def _lines(job: JobDetails) -> list[str]:
    """What Ray says of its end; last of all, what the job itself printed last."""
    return (job.message or "").strip().splitlines() or ["no reason given"]


def _attempts(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """Those that the cluster knows, first to last."""
    known = {job.submission_id: job for job in client.list_jobs()}
    return [known[one] for one in itertools.takewhile(known.__contains__, _ids(name))]


def _ids(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{count}" for count in itertools.count(2))


def _say(line: str) -> None:
    print(f"ddray: {line}", file=sys.stderr, flush=True)

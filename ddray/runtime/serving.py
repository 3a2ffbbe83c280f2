"""The image service on Ray Serve: replicas that hold a student, behind an HTTP front.

Requests of all clients share batches, and yet an image depends on its own request alone.
Imports ddray.errors, ddray.serving_api, ddray.runtime; replicas load ddray.models, ddray.seeding.
"""

import asyncio
import json
import logging
import os
import re
import socket
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.exceptions import RayServeException

from ddray.errors import ClusterError, ConfigError
from ddray.runtime.cluster import require
from ddray.runtime.ingress import Ingress
from ddray.serving_api import MAX_IMAGES, ImageJob, ModelCard, png_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ddray.config import ServeConfig
    from ddray.generate import Student

log = logging.getLogger("ray.serve")

APP_NAME = "ddray"

# Serve gives up, in plain text, only after the front has answered 504 in the service's own shape.
_GRACE_S = 10.0
_START_TRIES = 3
_START_WAIT_S = 30.0
_STOP_WAIT_S = 20.0
_FAILURES_UNTIL_ILL = 3

# The same image must be the same bytes whatever shared its batch, and float32 results vary in
# their last bits with the batch size (measured on a tiny student: 14 of 50000 pixels differ by one
# level between a batch of one and larger ones). So every forward pass has this many rows, the last
# pass padded. On a CPU one row takes at most 1.6 times what it takes in a batch of 64, and single
# requests are spared the padding; a GPU needs several rows to be busy.
_CPU_CHUNK = 1
_GPU_CHUNK = 16


def generate_images(
    student: "Student", jobs: Sequence[ImageJob], chunk_size: int
) -> list["npt.NDArray[np.float32]"]:
    """Images of a mixed batch: a pass takes any classes, indices and seeds, but one schedule.

    Args:
        student: the student.
        jobs: the images.
        chunk_size: rows of every forward pass; with it fixed, an image depends on its job alone.

    Returns:
        A float32 [C, H, W] in [0, 1] for each job.
    """
    import torch

    from ddray.seeding import noise

    shape = (student.num_tokens, student.codebook.shape[1])
    places = defaultdict(list)
    for place, job in enumerate(jobs):
        places[job.schedule].append(place)
    images: dict[int, npt.NDArray[np.float32]] = {}
    for schedule, members in places.items():
        for start in range(0, len(members), chunk_size):
            chunk = members[start : start + chunk_size]
            rows = chunk + chunk[-1:] * (chunk_size - len(chunk))
            codes_BLE = student.generate(
                [jobs[place].class_id for place in rows],
                noise=torch.cat([noise(jobs[p].seed, [jobs[p].index], shape) for p in rows]),
                schedule=schedule,
            )
            # Padded rows repeat the last job: they only write its image again.
            images.update(zip(rows, student.decode(codes_BLE).cpu().numpy(), strict=True))
    return [images[place] for place in range(len(jobs))]


class StudentReplica:
    """A student on one device, which makes the images of concurrent requests in common batches.

    Args:
        student: bundled name or model folder.
        max_batch_size: most images of one batch.
        batch_wait_s: how long a batch waits to fill.
        threads: CPU threads of torch.
        chunk_size: rows of a forward pass; None = what suits the device.
    """

    def __init__(
        self,
        student: str,
        max_batch_size: int,
        batch_wait_s: float,
        threads: int,
        chunk_size: int | None = None,
    ):
        import torch

        # One thread runs the model, so that Serve's event loop stays free to answer health checks
        # and to collect the next batch. OpenMP's number of threads is set there: it is per thread.
        self._thread = ThreadPoolExecutor(1, "student", torch.set_num_threads, (threads,))
        self._student: Student | None = None
        self._failures = 0
        self._card = self._thread.submit(self._load, student, chunk_size).result()
        self._batched.set_max_batch_size(max_batch_size)
        self._batched.set_batch_wait_timeout_s(batch_wait_s)

    def _load(self, spec: str, chunk_size: int | None) -> ModelCard:
        """Load the student and run every schedule once, since the first pass is the slow one."""
        from ddray import load_student

        started = time.perf_counter()
        student = load_student(spec)
        loaded = time.perf_counter()
        on_cpu = student.device.type == "cpu"
        self._chunk_size = chunk_size or (_CPU_CHUNK if on_cpu else _GPU_CHUNK)
        schedule = tuple(student.config.get("schedule", (0,)))
        jobs = [ImageJob(0, 0, 0, schedule[:1]), ImageJob(0, 0, 0, schedule)]
        height, width = generate_images(student, jobs, self._chunk_size)[0].shape[1:]
        self._student = student
        log.info(
            "student %s on %s: loaded in %.1f s, warmed up in %.1f s, %d rows a pass",
            *(spec, student.device, loaded - started, time.perf_counter() - loaded),
            self._chunk_size,
        )
        return ModelCard(
            id=student.config.get("name") or _name_of(spec),
            created=int(time.time()),
            num_classes=student.num_classes,
            class_names=tuple(map(str, student.config.get("class_names", ()))),
            schedule=schedule,
            size=f"{width}x{height}",
        )

    async def card(self) -> ModelCard:
        """What the student can make; an answer means that the replica is warm."""
        return self._card

    async def images(self, jobs: Sequence[ImageJob]) -> list[bytes]:
        """PNG files of one request, in order; they share batches with those of other requests."""
        return list(await asyncio.gather(*map(self._batched, jobs)))

    @serve.batch
    async def _batched(self, jobs: list[ImageJob]) -> list[bytes]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, jobs)

    def _render(self, jobs: list[ImageJob]) -> list[bytes]:
        assert self._student is not None
        self._failures += 1
        images = generate_images(self._student, jobs, self._chunk_size)
        files = [png_bytes(image) for image in images]
        self._failures = 0
        return files

    def check_health(self) -> None:
        """Raise if the model is gone, or fails at every batch, as after an error of a GPU.

        Runs nothing: a long batch is no illness.

        Raises:
            RuntimeError: and Serve replaces the replica.
        """
        if self._student is None:
            raise RuntimeError("the student of this replica is gone")
        # The batch that is under way counts as one until it has succeeded.
        if self._failures > _FAILURES_UNTIL_ILL:
            raise RuntimeError(f"the last {_FAILURES_UNTIL_ILL} batches of this replica failed")


def _name_of(spec: str) -> str:
    """Name of a student that has none: its folder, or that of the run it lies in as `student`."""
    parts = [part for part in spec.replace("\\", "/").split("/") if part]
    return parts[-2] if parts[-1] == "student" and len(parts) > 1 else parts[-1]


def build_app(
    student: str,
    *,
    max_batch_size: int = 64,
    batch_wait_s: float = 0.005,
    threads: int = 1,
    num_replicas: int = 1,
    request_timeout_s: float = 60.0,
    num_gpus: float = 0,
    chunk_size: int | None = None,
) -> serve.Application:
    """The Serve application of a student.

    Args:
        student: bundled name or model folder (path or URI).
        max_batch_size: most images of one batch.
        batch_wait_s: how long a batch waits to fill.
        threads: CPU threads of a replica, and CPUs that it reserves.
        num_replicas: copies of the student.
        request_timeout_s: longest time from a request to its images.
        num_gpus: GPUs of a replica.
        chunk_size: rows of a forward pass; None = 1 on a CPU, 16 on a GPU. Between chunk sizes,
            single pixels may differ by one level.

    Returns:
        The application; its front is the ingress.

    Raises:
        ConfigError: if there is no such student.
    """
    spec = _located(student)
    # Eight batches deep, the queue of a replica; at least one request of full size.
    max_images = max(8 * max_batch_size * num_replicas, MAX_IMAGES)
    replica = serve.deployment(
        StudentReplica,
        num_replicas=num_replicas,
        # Even requests for one image each fill one batch while another is under way.
        max_ongoing_requests=2 * max_batch_size,
        max_queued_requests=max_images,
        max_constructor_retry_count=_START_TRIES,
        # What is under way may finish, and nothing lasts longer.
        graceful_shutdown_timeout_s=min(request_timeout_s, _STOP_WAIT_S),
        ray_actor_options={"num_cpus": threads, "num_gpus": num_gpus},
    )
    front = serve.deployment(
        Ingress,
        # Far above what it admits: it must get to refuse in its own words.
        max_ongoing_requests=4 * max_images + 100,
        # It only waits; a whole CPU would not be there on the smallest machines.
        ray_actor_options={"num_cpus": 0},
    )
    bound = replica.bind(spec, max_batch_size, batch_wait_s, threads, chunk_size)
    return front.bind(bound, request_timeout_s, max_images)


def _located(student: str) -> str:
    """The student in words that mean the same on every node, refused if there is none."""
    from ddray.checkpoint import CONFIG_FILE
    from ddray.models.catalog import BUNDLED_MODELS
    from ddray.models.zoo import FAMILIES, resolve
    from ddray.storage import open_storage

    config = json.loads(open_storage(str(resolve(student))).read(CONFIG_FILE))
    valid = [name for name, family in FAMILIES.items() if family.kind == "student"]
    if config.get("family") not in valid:
        raise ConfigError(
            f"{student} is of family {config.get('family')!r}, which is no student; "
            f"students are {', '.join(valid)}"
        )
    if student in BUNDLED_MODELS or "://" in student:
        return student
    return os.path.abspath(student)


def run(config: "ServeConfig") -> str:
    """Start the service in the Ray that this process is connected to.

    Args:
        config: the student, where to listen, sizes and times.

    Returns:
        The base URL, at which it answers.

    Raises:
        ConfigError: if there is no such student.
        ClusterError: if the port is taken, the cluster is too small or the service does not start.
    """
    application = build_app(
        config.student,
        max_batch_size=config.max_batch_size,
        batch_wait_s=config.batch_wait_s,
        threads=config.threads,
        num_replicas=config.replicas,
        request_timeout_s=config.request_timeout_s,
    )
    require(f"serving {config.student}", config.replicas, config.threads, 0)
    # Serve tells each step of its start on the terminal of who starts it.
    log.setLevel(logging.WARNING)
    running = bool(serve.status().proxies)
    if not running:
        _check_port(config.host, config.port)
        # The first start of Serve in a cluster decides on these for as long as it runs.
        serve.start(
            http_options={
                "host": config.host,
                "port": config.port,
                "request_timeout_s": config.request_timeout_s + _GRACE_S,
            },
            logging_config={"enable_access_log": False},
        )
    try:
        serve.run(application, name=APP_NAME, route_prefix="/")
        url = _url(config.host, config.port)
        _check_answers(url, running)
    except (RuntimeError, ValueError, RayServeException) as error:
        reason = _reason(error)
        _remove(running)
        raise ClusterError(f"the service of {config.student} did not start: {reason}") from error
    except ClusterError:
        _remove(running)
        raise
    return url


def _reason(error: Exception) -> str:
    """Why an application failed: the last exception of its deployments, which Serve only logs."""
    application = serve.status().applications.get(APP_NAME)
    messages = [d.message for d in application.deployments.values()] if application else []
    raised = re.findall(r"^[\w.]*(?:Error|Exception): .+", "\n".join(messages), re.MULTILINE)
    return raised[-1] if raised else " ".join(str(error).split())[-600:]


def _remove(keep_serve: bool) -> None:
    if keep_serve:
        serve.delete(APP_NAME)
    else:
        serve.shutdown()


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a service that has just stopped are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; "
                "stop what uses it, or choose another with --port"
            ) from error


def _url(host: str, port: int) -> str:
    """URL for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_answers(url: str, was_running: bool) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_WAIT_S
    while time.monotonic() < deadline:
        try:
            direct.open(f"{url}/readyz", timeout=5).close()
            return
        except OSError:  # HTTP errors too
            time.sleep(0.2)
    hint = (
        "; Serve was running in this Ray before, and keeps the host and port of its first start"
        if was_running
        else ""
    )
    raise ClusterError(f"the service started, but {url}/readyz does not answer{hint}")


def serve_student(config: "ServeConfig", block: bool = True) -> str:
    """Start the service and, if asked to, stay until interrupted.

    Args:
        config: as for `run`.
        block: serve until Ctrl-C, then stop Serve; else leave it running.

    Returns:
        The base URL.

    Raises:
        ConfigError: as `run`.
        ClusterError: as `run`.
    """
    url = run(config)
    print(f"{config.student} is served at {url}: a page to try it, the API under /v1", flush=True)
    if block:
        print("Ctrl-C stops it", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            serve.shutdown()
    return url

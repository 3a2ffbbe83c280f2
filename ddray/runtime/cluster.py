"""The Ray that a job runs on: the one it was submitted to, or a private one on this machine.

Imports ddray.errors.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

from ddray.errors import ClusterError, one_line

# Ray counts logical CPUs. Two above the cores mean that a pool of actors which takes every core
# still leaves room for Ray's own light tasks; without them its reads would wait for ever.
_SPARE_CPUS = 2
_OBJECT_STORE_BYTES = 200 * 2**20
# Ray's processes keep the memory they have freed: where page faults are slow, as in a virtual
# machine, giving it back after every step costs a training a tenth of its speed (measured).
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Read by Serve's own processes.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ddray.runtime.proxy:middlewares",
    # A replica that fails its health checks is given up at once: what it had in hand is begun again
    # elsewhere, and in time, where waiting for it would use up the deadline of its requests.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
# Unix sockets live in Ray's folder and their paths end at 107 bytes, so the folder must be short.
_SHORT_TEMP = "/tmp"
_LOOK_EVERY_S = 2.0


@contextlib.contextmanager
def connect(metrics_port: int | None = None) -> Iterator[None]:
    """Be connected to Ray: to `RAY_ADDRESS` if set, else to a new private Ray.

    Submitted jobs have the address. A Ray that this process is connected to already is used and
    left running. A Ray that merely happens to run on this machine is never joined.

    Args:
        metrics_port: where a new Ray shows its metrics to Prometheus; None = nowhere in particular.

    Raises:
        ClusterError: if Ray cannot start or be reached.
    """
    # Read at import: workers at the driver's priority; a private loopback Ray needs no token file.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default a task is tried again at once: all its retries are gone before a lost node is known
    # to be lost.
    os.environ.setdefault("RAY_task_retry_delay_ms", "3000")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        for name, value in (KEEP_FREED_MEMORY | SERVE_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        # Ray's C++ core reports at ERROR level, past Python's logging, what is no error to anybody
        # (that a pool's actors may restart). What does go wrong reaches us as an exception.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    temp = None if address else tempfile.mkdtemp(prefix="ddray-", dir=_SHORT_TEMP)
    try:
        _start(address, temp, metrics_port)
        yield
    finally:
        ray.shutdown()
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)


def _start(address: str | None, temp: str | None, metrics_port: int | None) -> None:
    import ray

    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=(os.cpu_count() or 1) + _SPARE_CPUS,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=temp,
                _metrics_export_port=metrics_port,
                **quiet,
            )
    except Exception as error:  # Ray raises the bare Exception when a node does not come up
        where = f"connect to Ray at RAY_ADDRESS={address}" if address else "start a local Ray"
        advice = "is it running?" if address else "free memory or disk in /tmp, then rerun"
        raise ClusterError(f"cannot {where}: {one_line(error)}; {advice}") from error


def require(what: str, workers: int, num_cpus: float, num_gpus: float, wait_s: float = 0.0) -> None:
    """Refuse a job that the cluster cannot run, at once or after a wait for nodes.

    Args:
        what: the job, for people.
        workers: how many must fit at the same time.
        num_cpus: of a worker.
        num_gpus: of a worker.
        wait_s: how long a cluster that grows by itself is given; it is told what is wanted.

    Raises:
        ClusterError: with what is asked for and what there is.
    """
    import ray

    asked = {"CPU": num_cpus, "GPU": num_gpus}
    bundle = {name: number for name, number in asked.items() if number}
    deadline = time.monotonic() + wait_s
    try:
        while (room := _room(num_cpus, num_gpus)) < workers:
            if time.monotonic() >= deadline:
                total = ray.cluster_resources()
                raise ClusterError(
                    f"{what} asks for {workers} workers of {num_cpus:g} CPUs and {num_gpus:g} "
                    f"GPUs, but the cluster has room for {room}: {total.get('CPU', 0):g} CPUs and "
                    f"{total.get('GPU', 0):g} GPUs on {len(_nodes())} nodes; ask for fewer or "
                    "smaller workers, or a larger cluster"
                )
            ray.autoscaler.sdk.request_resources(bundles=[bundle] * workers)
            time.sleep(min(_LOOK_EVERY_S, wait_s))
    finally:
        if wait_s:
            # From here on it is the job itself that holds the nodes.
            ray.autoscaler.sdk.request_resources(bundles=[])


def _nodes() -> list[dict[str, Any]]:
    """Nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _room(num_cpus: float, num_gpus: float) -> int:
    """How many workers fit at the same time: a worker lies on one node, a part of a GPU on one."""
    room = 0
    for node in _nodes():
        has = node["Resources"]
        fits = int(has.get("CPU", 0) // num_cpus)
        if num_gpus:
            gpus = has.get("GPU", 0)
            on_gpus = gpus // num_gpus if num_gpus >= 1 else gpus * (1 // num_gpus)
            fits = min(fits, int(on_gpus))
        room += fits
    return room

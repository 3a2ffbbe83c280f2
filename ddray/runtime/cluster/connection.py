"""The Ray that a job runs on: the one it was submitted to, or a private one on this machine."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from ddray import __version__
from ddray.errors import ClusterError, StoppedError, one_line
from ddray.runtime.cluster.limits import usable_cpus

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
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ddray.runtime.serving.proxy:middlewares",
    # A replica that fails its health checks is given up at once: what it had in hand is begun again
    # elsewhere, and in time, where waiting for it would use up the deadline of its requests.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
CLUSTER_ENVIRONMENT = {
    **KEEP_FREED_MEMORY,
    **SERVE_ENVIRONMENT,
    # Workers at the priority of all else, not at nice 15.
    "RAY_worker_niceness": "0",
    # From `ray job stop` to a kill, s: a training writes its last checkpoint.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
"""What Ray's own processes must find in their environment on every node; the image sets it."""
_ASKING_S = 30.0
_STARTS, _TOO_SLOW = 4, "timed out during startup"
# Folders of Rays that this process has started: one, or none.
_private: list[str] = []
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Collectives know no token.
_LOOPBACK = (
    {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
)
_LEVEL_NOTICE = b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"
# Unix sockets live in Ray's folder and their paths end at 107 bytes, so the folder must be short.
_SHORT_TEMP = "/tmp"


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
    # Read at import: workers at the driver's priority.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default a task is tried again at once: all its retries are gone before a lost node is known
    # to be lost.
    os.environ.setdefault("RAY_task_retry_delay_ms", "3000")
    # A thread of Serve's that asks something after the end would start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        for name, value in (KEEP_FREED_MEMORY | SERVE_ENVIRONMENT | _LOOPBACK).items():
            os.environ.setdefault(name, value)
    # Ray's C++ core reports at ERROR level, past Python's logging, what is no error to anybody
    # (that a pool's actors may restart). What does go wrong reaches us as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.nullcontext() if address else _privately() as temp:
        try:
            with _without_rays_own_notices():
                _start(address, temp, metrics_port)
            with _terminable():
                yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _privately() -> Iterator[str]:
    """Within, a Ray that starts is this process's own: its folder, its token, its network."""
    temp = tempfile.mkdtemp(prefix="ddray-", dir=_SHORT_TEMP)
    _private.append(temp)
    try:
        with _token_of_its_own():
            yield temp
    finally:
        _private.remove(temp)
        shutil.rmtree(temp, ignore_errors=True)


def private_folder() -> str | None:
    """Folder of the Ray that `connect` has started on this machine; None = it is another's."""
    return _private[-1] if _private else None


@contextlib.contextmanager
def _token_of_its_own() -> Iterator[None]:
    """Within, a Ray that starts obeys nobody but its own processes, which inherit the token.

    Its ports listen on every interface and run what they are sent. The token is drawn for this one
    Ray, whatever the environment says of tokens: that is meant for clusters.
    """
    before = {name: os.environ.pop(name, None) for name in _TOKEN_VARIABLES}
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    _let_ray_read_its_token()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _let_ray_read_its_token()


def obeys_strangers(gcs_address: str) -> bool:
    """Whether a Ray does what it is told by a client that has no token.

    Args:
        gcs_address: HOST:PORT of the head's control store, which every client speaks to first.
    """
    import grpc

    # Lists the keys of an empty name: all that a stranger needs to be told is whether it may ask.
    method = "/ray.rpc.InternalKVGcsService/InternalKVKeys"
    with grpc.insecure_channel(gcs_address) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=_ASKING_S, wait_for_ready=True)
        except grpc.RpcError as error:
            return error.code() not in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
    return True


def _let_ray_read_its_token() -> None:
    # Ray keeps what it has read of them at its import, and at the first connection.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _without_rays_own_notices() -> Iterator[None]:
    """Within, the C++ core does not tell on stderr that it has been told its log level.

    It writes past Python and before that level counts. All other lines pass through as they come.
    """
    terminal = os.dup(2)
    reading, writing = os.pipe()

    def pass_on() -> None:
        with os.fdopen(reading, "rb") as lines, os.fdopen(terminal, "wb", 0) as out:
            for line in lines:
                if _LEVEL_NOTICE not in line:
                    out.write(line)

    passing = threading.Thread(target=pass_on, daemon=True)
    passing.start()
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        # Not for ever: a process that Ray has started may hold the other end.
        passing.join(timeout=1.0)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM (`ray job stop`) ends the process in order; Ray would dump its stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # what is on its way out is not to be told again
        print("ddray: terminated; what is written stays", file=sys.stderr, flush=True)
        sys.exit(StoppedError.exit_code)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _start(address: str | None, temp: str | None, metrics_port: int | None) -> None:
    import ray

    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
            has = ray.cluster_resources()
            print(
                f"ddray {__version__} from {Path(__file__).parents[2]}, Ray {ray.__version__} at "
                f"{address}: {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs",
                file=sys.stderr,
                flush=True,
            )
        else:
            assert temp is not None
            start_here(
                temp,
                address="local",
                num_cpus=usable_cpus() + _SPARE_CPUS,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _metrics_export_port=metrics_port,
                **quiet,
            )
    except Exception as error:  # Ray raises the bare Exception when a node does not come up
        where = f"connect to Ray at RAY_ADDRESS={address}" if address else "start a local Ray"
        advice = "is it running?" if address else "free memory or disk in /tmp, then rerun"
        raise ClusterError(f"cannot {where}: {one_line(error)}; {advice}") from error


def start_here(temp: str, **settings: Any) -> None:
    """Start a Ray, on a very busy machine more than once: Ray gives itself half a minute.

    Args:
        temp: folder of its files, a short path.
        **settings: of `ray.init`.

    Raises:
        Exception: what `ray.init` raises, where another start would not help.
    """
    import ray

    for attempt in range(_STARTS):
        folder = f"{temp}/{attempt}" if attempt else temp
        try:
            ray.init(_temp_dir=folder, **settings)
            return
        except Exception as error:
            if _TOO_SLOW not in str(error) or attempt == _STARTS - 1:
                raise
            _end_processes(folder)


def _end_processes(folder: str) -> None:
    """End what a start that has failed has left, which would come up some time."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(folder in part for part in process.cmdline()):
                process.kill()

"""How the service ends: what was begun is answered, then all goes at once, and in silence."""

import logging
import os
import socket
import threading
import time
from concurrent.futures import TimeoutError as LateError

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

log = logging.getLogger("ray.serve")

# For a front to say that it has nothing in hand, beyond what it was told to wait.
_SLACK_S = 5.0
_SHUTDOWN_S = 30.0


def drain(application: str, front: str, wait_s: float) -> None:
    """Wait until what an application has begun is answered; what comes then is refused.

    Args:
        application: its name.
        front: name of its deployment that takes requests, which has a method `drain`.
        wait_s: for how long at most, in seconds.
    """
    try:
        found = serve.status().applications.get(application)
        if found is None or found.status != ApplicationStatus.RUNNING:
            return
        handle = serve.get_deployment_handle(front, application)
        handle.broadcast("drain", wait_s).results(timeout_s=wait_s + _SLACK_S)
    except (RayServeException, RayError, LateError, ValueError):
        pass  # a front that is not to be had has nothing in hand


def remove(application: str, keep_serve: bool = False) -> None:
    """End an application, and Serve with it unless others use it.

    Args:
        application: its name; it need not be there.
        keep_serve: whether Serve stays in any case.
    """
    # First the application, so that what was begun can still be answered: a shutdown takes the
    # proxy away at once.
    if application in serve.status().applications:
        serve.delete(application)
    if not keep_serve and not serve.status().applications:
        _shut_serve_down()


def _shut_serve_down() -> None:
    """As `serve.shutdown`, whose call of a controller that ends by it Ray reports as a failure."""
    deadline = time.monotonic() + _SHUTDOWN_S
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_SHUTDOWN_S)
        while time.monotonic() < deadline:
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            time.sleep(0.1)
    except (ValueError, RayError):  # it is not there, or no longer
        pass
    serve.shutdown()  # of what this process keeps of it


def _ray_answers() -> bool:
    """Not where the signal went to all processes of the service: then nobody has anything in hand.

    Whoever asks Serve then waits for a minute, and is ended by Ray.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def end_service(application: str, front: str, wait_s: float) -> None:
    """End the service of this process.

    Args:
        application: its name.
        front: name of its deployment that takes requests.
        wait_s: for how long what was begun may go on.
    """
    # Whatever is lost from here on is lost on purpose.
    log.setLevel(logging.CRITICAL)
    if os.environ.get("RAY_ADDRESS"):
        remove(application)
        return
    # A Ray of this command's own ends with the command, and Serve with it.
    draining = threading.Thread(target=drain, args=(application, front, wait_s), daemon=True)
    draining.start()
    while draining.is_alive() and _ray_answers():
        draining.join(0.1)

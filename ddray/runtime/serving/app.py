"""The image service on Ray Serve: its two deployments, and how they start.

Requests of all clients share batches, and yet an image depends on its own request alone.
"""

import errno
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ray import serve
from ray.serve.exceptions import RayServeException

from ddray import __version__
from ddray.config.base import reserved_device
from ddray.config.loading import load_config
from ddray.config.serving import MAX_IMAGES, ServeConfig
from ddray.errors import ClusterError, ConfigError
from ddray.locations import BUNDLED, S3
from ddray.models.catalog import BUNDLED_MODELS
from ddray.models.families import FAMILIES, empty_network
from ddray.models.zoo import image_side, resolve
from ddray.runtime.cluster.capacity import node_labels, require
from ddray.runtime.cluster.doctor import preflight
from ddray.runtime.serving.ingress import Doors, Ingress
from ddray.runtime.serving.logs import keep_log
from ddray.runtime.serving.replica import Stock, StudentReplica
from ddray.runtime.serving.stopping import end_service, remove
from ddray.serving.api import ModelCard
from ddray.serving.api_keys import read_keys
from ddray.serving.order import find_examples
from ddray.storage import open_storage
from ddray.storage.checkpoint import read_config
from ddray.text.loading import check_text_encoder, own_encoder, own_folders

log = logging.getLogger("ray.serve")

APP_NAME = "ddray"
STUDENTS, _FRONT = "students", "ingress"
"""The deployments of the replicas, and of what takes requests."""

# Serve gives up, in plain text, only after the front has answered 504 in the service's own shape.
_GRACE_S = 10.0
_START_TRIES = 3
# The ingress keeps the access log.
_QUIET = {"enable_access_log": False}
_START_WAIT_S = 30.0
_LISTEN_ADVICE: dict[int | None, str] = {
    errno.EADDRINUSE: "stop what uses it, or choose another with --port",
    errno.EACCES: "ports below 1024 are for root; choose another with --port",
}
_STOP_WAIT_S = 20.0


def build_app(config: ServeConfig) -> serve.Application:
    """The Serve application of some students; its front is the ingress.

    Raises:
        ConfigError: if there is no such student, two have one name, or the keys cannot be read.
        CheckpointError: if there is no such text encoder.
    """
    if config.teacher is None:
        bundled = set(config.student) <= set(BUNDLED_MODELS)
        config = config.model_copy(update={"teacher": bundled})
    cards, students = {}, {}
    for student in config.student:
        card = described(student, config)
        if card.id in cards:
            raise ConfigError(f"two of the students are called {card.id!r}; rename a folder")
        cards[card.id], students[card.id] = card, student
    stock = Stock(
        students,
        bool(config.teacher),
        config.text_encoder,
        config.rows,
        config.threads,
        config.models_per_replica,
        reserved_device(config.num_gpus),
        config.dtype,
    )
    doors = Doors(
        cards,
        read_keys(config.api_keys_file),
        config.cors_origins,
        config.images_uri,
        config.url_expires_s,
        config.access_log,
        config.log_prompts,
        may_sleep=config.replicas[0] == 0,
    )
    undated = replace(doors, cards={name: replace(card, created=0) for name, card in cards.items()})
    teachers = {card.teacher for card in cards.values() if card.teacher}
    encoders = {
        _encoder_of(_config(students[name]), config)
        for name, card in cards.items()
        if card.conditioning == "text"
    }
    places = (*students.values(), *sorted(teachers), *sorted(_encoder_folders(encoders)))
    files = {place: _versions(place) for place in places}
    replicas = _kept_while(replica_deployment(config), stock, files)
    return _kept_while(ingress_deployment(config), undated).bind(replicas.bind(stock), doors)


def _kept_while(deployment: serve.Deployment, *same: object) -> serve.Deployment:
    """A deployment whose replicas stay as long as all this is the same.

    `serve.run` gives every deployment without a version a new one, which replaces all replicas; and
    it takes versions only from its own code.
    """
    digest = hashlib.sha256(repr((__version__, same)).encode()).hexdigest()
    return deployment.options(version=digest[:16], _internal=True)


def _versions(model: str) -> dict[str, str]:
    """Versions of a model's files; what is bundled changes with ddray alone."""
    if model in BUNDLED_MODELS:
        return {}
    storage = open_storage(model)
    return {name: storage.version(name) for name in storage.list()}


def _encoder_of(student: Mapping[str, Any], wanted: ServeConfig) -> str:
    """Name or folder of the encoder that a student of captions reads, by its config."""
    return wanted.text_encoder or own_encoder(student)


def _encoder_folders(encoders: Iterable[str]) -> set[str]:
    """Folders of encoders that may be trained anew; what is bundled or of the Hub has a name."""
    folders = {folder for encoder in encoders for folder in own_folders(encoder) or [encoder]}
    return {folder for folder in folders if _may_change(folder)}


def _may_change(folder: str) -> bool:
    return folder.startswith(S3) or (Path(folder).is_dir() and BUNDLED not in Path(folder).parents)


def build(arguments: dict[str, Any]) -> serve.Application:
    """As `build_app`, for `import_path` and `args` of a Serve config file."""
    return build_app(load_config(ServeConfig, preset=arguments))


def replica_deployment(config: ServeConfig) -> serve.Deployment:
    """What makes images: a fixed number of replicas, or as many as the load asks for."""
    least, most = config.replicas
    number: dict[str, Any] = {"num_replicas": least}
    if least != most:
        target = config.target_ongoing_requests or max(1, config.max_batch_size / 4)
        number = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": target,
                "upscale_delay_s": config.upscale_delay_s,
                "downscale_delay_s": config.downscale_delay_s,
                # The load is looked at over a time shorter than the shortest delay.
                "look_back_period_s": max(2.0, min(10.0, config.upscale_delay_s)),
                "metrics_interval_s": 1.0,
            }
        }
    return serve.deployment(
        StudentReplica,
        name=STUDENTS,
        # Changes of these alone reach running replicas, without a restart.
        user_config={
            "max_batch_size": config.max_batch_size,
            "batch_wait_s": config.batch_wait_s,
            "hung_s": 2 * config.request_timeout_s,
        },
        max_ongoing_requests=config.ongoing_limit,
        max_queued_requests=config.admission_limit,
        max_constructor_retry_count=_START_TRIES,
        logging_config=_QUIET,
        # Three checks without an answer end a replica, by usual timeouts well before its requests'
        # deadline: they are begun again elsewhere.
        health_check_period_s=5,
        health_check_timeout_s=max(1.0, min(10.0, config.request_timeout_s / 6)),
        # What is under way may finish; what takes longer is begun again elsewhere.
        graceful_shutdown_timeout_s=min(config.request_timeout_s, _STOP_WAIT_S),
        ray_actor_options={
            "num_cpus": config.threads,
            "num_gpus": config.num_gpus,
            "label_selector": node_labels(config.node_pool),
        },
        **number,
    )


def ingress_deployment(config: ServeConfig) -> serve.Deployment:
    """What answers HTTP."""
    share = -(-config.admission_limit // config.ingress_replicas)
    # A batch under way and a batch that waits, on every replica.
    busy = 2 * config.max_batch_size * max(1, config.replicas[0])
    return serve.deployment(
        Ingress,
        name=_FRONT,
        num_replicas=config.ingress_replicas,
        user_config={
            "max_images": share,
            "least_images": min(share, max(MAX_IMAGES, busy // config.ingress_replicas)),
            "request_timeout_s": config.request_timeout_s,
        },
        # Far above what it admits: it must get to refuse in its own words.
        max_ongoing_requests=4 * share + 100,
        # It only waits; a whole CPU would not be there on the smallest machines.
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )


def _config(student: str) -> dict[str, Any]:
    """What a student's folder says of it."""
    where = resolve(student)
    if isinstance(where, Mapping):
        raise ConfigError(
            f"{student} is a set of sizes without weights; make a model folder of the published "
            f"files, and serve that: `ddray models show {student}` says where they are"
        )
    return read_config(where)


def described(student: str, wanted: ServeConfig) -> ModelCard:
    """What a student can make."""
    config = _config(student)
    valid = [name for name, family in FAMILIES.items() if family.kind == "student"]
    if config.get("family") not in valid:
        raise ConfigError(
            f"{student} is of family {config.get('family')!r}, which is no student; "
            f"students are {', '.join(valid)}"
        )
    teacher = str(config.get("teacher", "")) if wanted.teacher else ""
    if wanted.teacher and not teacher:
        raise ConfigError(f"the config of {student} names no teacher that could be deployed")
    if teacher:
        resolve(teacher)
    network, side = empty_network(config, student), image_side(config, student)
    examples: tuple[str, ...] = ()
    if network.conditioning == "text":
        examples = find_examples(config, student)
        check_text_encoder(_encoder_of(config, wanted), student, network.config.caption_dim)
    return ModelCard(
        id=config.get("name") or _name_of(student),
        created=int(time.time()),
        conditioning=network.conditioning,
        num_classes=network.config.num_classes,
        class_names=tuple(map(str, config.get("class_names", ()))),
        schedule=tuple(config.get("schedule", (0,))),
        stages=len(network.stages),
        teacher=teacher,
        size=f"{side}x{side}",
        example_captions=examples,
    )


def _name_of(student: str) -> str:
    """Name of a student that has none: its folder, or that of the run it lies in as `student`."""
    parts = [part for part in student.replace("\\", "/").split("/") if part]
    return parts[-2] if parts[-1] == "student" and len(parts) > 1 else parts[-1]


def run(config: ServeConfig) -> str:
    """Start the service in the Ray that this process is connected to, or change a running one.

    Args:
        config: the students, where to listen, sizes and times.

    Returns:
        The base URL, at which it answers.

    Raises:
        ConfigError: if there is no such student.
        ClusterError: if the port is taken, the cluster is too small or the service does not start.
    """
    application, served = build_app(config), ", ".join(config.student)
    least = max(1, config.replicas[0])
    require(
        f"serving {served}",
        least,
        config.threads,
        config.num_gpus,
        config.wait_s,
        config.node_pool,
    )
    preflight(config.threads, config.num_gpus, config.node_pool, config.student)
    # Serve tells each step of its start on the terminal of who starts it.
    log.setLevel(logging.WARNING)
    found = serve.status()
    running, updating = bool(found.proxies), APP_NAME in found.applications
    if found.applications and not running:
        raise ClusterError(
            f"cannot serve {served}: Ray Serve runs here without HTTP, for "
            f"{', '.join(sorted(found.applications))}; wait until that has ended"
        )
    if not running:
        _check_port(config.host, config.port)
        # The first start of Serve in a cluster decides on these for as long as it runs.
        serve.start(
            http_options={
                "host": config.host,
                "port": config.port,
                "request_timeout_s": config.request_timeout_s + _GRACE_S,
            },
            logging_config=_QUIET,
        )
    try:
        serve.run(application, name=APP_NAME, route_prefix="/")
        url = _url(config.host, config.port)
        _check_answers(url, running)
    except (RuntimeError, ValueError, RayServeException) as error:
        reason = failure_reason(error, APP_NAME)
        if not updating:  # what served before may serve on
            remove(APP_NAME, running)
        raise ClusterError(f"the service of {served} did not start: {reason}") from error
    except ClusterError:
        if not updating:
            remove(APP_NAME, running)
        raise
    return url


def failure_reason(error: Exception, name: str) -> str:
    """Why an application failed: the last exception of its deployments, which Serve only logs."""
    application = serve.status().applications.get(name)
    messages = [d.message for d in application.deployments.values()] if application else []
    raised = re.findall(r"^[\w.]*(?:Error|Exception): .+", "\n".join(messages), re.MULTILINE)
    return raised[-1] if raised else " ".join(str(error).split())[-600:]


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a service that has just stopped are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            advice = _LISTEN_ADVICE.get(
                number, "--host takes an address of this machine, or 0.0.0.0 for all of them"
            )
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ClusterError(f"cannot listen on {host}:{port}: {reason}; {advice}") from error


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


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


def serve_students(config: ServeConfig, block: bool = True) -> str:
    """Start the service and, if asked to, stay until interrupted.

    Args:
        config: as for `run`.
        block: serve until Ctrl-C or SIGTERM, then stop Serve; else leave it running.

    Returns:
        The base URL.

    Raises:
        ConfigError: as `run`.
        ClusterError: as `run`.
    """
    # Ray's own handler ends the process on the spot, with a stack dump and nothing cleaned up.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    served, log_folder = ", ".join(config.student), keep_log(config.log_dir, config.port)
    print(f"Serve's log: {log_folder}", flush=True)
    try:
        url = run(config)
    except (KeyboardInterrupt, SystemExit) as signalled:  # when it may answer already
        if os.environ.get("RAY_ADDRESS"):
            raise
        _end(config, signalled)
    print(f"{served}: served at {url}, a page to try it, the API under /v1", flush=True)
    if not block:
        return url
    print("Ctrl-C stops it", flush=True)
    # Where there is no screen, a browser of the terminal would take that over.
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(url)
    try:
        while True:
            time.sleep(3600)
    except (KeyboardInterrupt, SystemExit) as signalled:
        _end(config, signalled)


def _end(config: ServeConfig, signalled: KeyboardInterrupt | SystemExit) -> NoReturn:
    print("stopping; what was begun is still answered", file=sys.stderr, flush=True)
    end_service(APP_NAME, _FRONT, min(config.request_timeout_s, _STOP_WAIT_S))
    sys.exit(signalled.code if isinstance(signalled, SystemExit) else 130)

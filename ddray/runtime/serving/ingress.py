"""The HTTP front of the image service: routes, limits, admission, retries, wording of errors.

Its limits lie below Serve's own, whose answers are plain text.
"""

import asyncio
import base64
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve import metrics
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from ddray import __version__
from ddray.errors import StorageError
from ddray.runtime.serving.access import NEXT_TO_NOTHING, NO_STORE, Access, answer, too_large
from ddray.serving.admission import Admission
from ddray.serving.api import (
    MAX_BODY_BYTES,
    ModelCard,
    RequestError,
    parse_request,
    to_json,
)
from ddray.serving.image_file import MEDIA_TYPES
from ddray.serving.order import Order, check_request, find_card
from ddray.serving.schema import GENERATIONS, MODEL, MODELS, RAW, openapi
from ddray.storage.s3 import S3Storage

log = logging.getLogger("ray.serve")

_PROBE_TIMEOUT_S = 2.0
# An answer so lately is a better sign than a probe.
_FRESH_S = 5.0
# What is admitted should be made in so long; more would only wait.
_QUEUE_S = 3.0
_RETRY_AFTER_LOSS_S = 0.1
# At the end: for how long what was on its way is taken, and how long nothing must have come.
_LATECOMERS_S, _QUIET_S = 1.0, 0.3
# A body that is too large is read to its end before it is refused, since a client that is still
# sending may never read the answer; but not without end.
_MAX_DRAINED_BYTES = 64_000_000


def _json(value: object, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), headers=headers, media_type="application/json")


async def _refused(request: Request, error: RequestError) -> Response:
    return answer(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    path = f"{request.method} {request.url.path[:80]!r}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        known = "POST /v1/images/generations, POST /v1/images/raw, GET /v1/models"
        message, code = f"{path} does not exist; there are {known}", "not_found"
    elif error.status_code == 405:
        message = f"{path} is not allowed; use {_methods(request)[0]}"
        headers["Allow"], code = ", ".join(_methods(request)), "method_not_allowed"
    else:
        message, code = f"{path}: {error.detail}", "bad_request"
    return answer(RequestError(error.status_code, message, code), headers)


def _methods(request: Request) -> list[str]:
    """What may be asked of a path, the method that it is there for first."""
    path = request.scope["route"].path
    routes = [route for route in request.app.routes if getattr(route, "path", None) == path]
    return [method for route in routes for method in sorted(route.methods)]


async def _options(request: Request) -> Response:
    return Response(status_code=204, headers={"Allow": ", ".join(_methods(request))})


async def _left(request: Request, error: ClientDisconnect | TaskCancelledError) -> Response:
    """For nobody but the log.

    Serve cancels the request of a client that left and what that request itself had called, and
    which of the two ends first is chance.
    """
    return answer(RequestError(499, "the client left before its request had ended", "client_left"))


async def _failed(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so Serve logs the traceback.
    message = (
        "the service failed; its log says why, under this x-request-id, in the folder that "
        "`ddray serve` named when it started"
    )
    return answer(RequestError(500, message, "internal_error"))


def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, which allow its inline script and style by hash and no other."""
    text = Path(__file__).with_name("page.html").read_text("utf-8")
    allowed = []
    for tag in ("script", "style"):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (hashlib.sha256(part.encode()).digest() for part in inner)
        hashes = (f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        allowed.append(f"{tag}-src 'self' {' '.join(hashes)}")
    policy = (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
        f"frame-ancestors 'none'; {'; '.join(allowed)}"
    )
    headers = {"Content-Security-Policy": policy}
    return text.encode(), headers


async def _read_body(request: Request) -> bytes:
    """The body of a JSON request.

    Raises:
        RequestError: 415 for another content type, 413 for a body that is too large.
    """
    body, received = bytearray(), 0
    async for part in request.stream():
        received += len(part)
        if received <= MAX_BODY_BYTES:
            body += part
        elif received > _MAX_DRAINED_BYTES:
            break
    if received > MAX_BODY_BYTES:
        raise too_large()
    packed = request.headers.get("content-encoding", "").strip().lower()
    if packed not in ("", "identity"):
        message = f"content-encoding {packed[:80]!r} is not supported; send the JSON as it is"
        raise RequestError(415, message, "unsupported_media_type")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"content-type {kind[:80]!r} is not supported; send application/json"
        raise RequestError(415, message, "unsupported_media_type")
    return bytes(body)


@dataclass(frozen=True)
class Doors:
    """What an ingress is told once.

    Attributes:
        cards: of the students, by name; the first is the default.
        key_digests: of the API keys; none = open to all.
        cors_origins: of pages elsewhere that may call.
        images_uri: s3:// prefix to which linked images go; None = no links.
        url_expires_s: for how long a link is good.
        access_log: whether requests are logged.
        log_prompts: whether captions are, as they are.
        may_sleep: whether the service is ready without a replica, as it is when it scales to zero.
    """

    cards: dict[str, ModelCard]
    key_digests: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    images_uri: str | None = None
    url_expires_s: int = 3600
    access_log: bool = True
    log_prompts: bool = False
    may_sleep: bool = False


@serve.ingress()
class Ingress:
    """Checks requests, admits as many as can be served in time, and words every error.

    Args:
        replicas: handle of the students.
        doors: see `Doors`.
    """

    def __init__(self, replicas: DeploymentHandle, doors: Doors):
        self._replicas, self._doors = replicas, doors
        self._handles = {
            name: replicas.options(multiplexed_model_id=name).images for name in doors.cards
        }
        self._links = S3Storage(doors.images_uri) if doors.images_uri else None
        self._timeout_s, self._admission = 60.0, Admission()
        self._answered_at = -math.inf
        self._admitted_gauge = metrics.Gauge("ddray_admitted_images", "Images being made.")
        self._retries = metrics.Counter("ddray_retries_total", "Requests begun again.")
        self._retries.inc(NEXT_TO_NOTHING)
        self._page, self._page_headers = _page()
        keys, urls = bool(doors.key_digests), bool(doors.images_uri)
        self._schema = openapi(doors.cards, __version__, keys, urls)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new limits; requests under way are not disturbed."""
        self._timeout_s = float(user_config["request_timeout_s"])
        self._admission.limit = int(user_config["max_images"])
        self._admission.least = int(user_config["least_images"])
        self._admission.wait_s = min(_QUEUE_S, self._timeout_s / 4)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # noqa: N807  Serve calls it so
        """The routes, behind what every request passes."""
        # FastAPI's own pages load scripts from elsewhere, and its schema holds numbers as floats.
        routes = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            # They would lead wherever the client's Host header says.
            redirect_slashes=False,
        )
        routes.add_exception_handler(RequestError, _refused)  # type: ignore[arg-type]
        routes.add_exception_handler(HTTPException, _no_route)  # type: ignore[arg-type]
        for left in (ClientDisconnect, TaskCancelledError):
            routes.add_exception_handler(left, _left)  # type: ignore[arg-type]
        routes.add_exception_handler(Exception, _failed)
        posts: dict[str, Callable[..., Any]] = {GENERATIONS: self.generations, RAW: self.raw}
        gets: dict[str, Callable[..., Any]] = {
            MODELS: self.models,
            MODEL.replace("}", ":path}"): self.model,  # a name may hold slashes
            "/healthz": self.healthz,
            "/readyz": self.readyz,
            "/openapi.json": self.openapi,
            "/": self.page,
        }
        for path, endpoint in {**posts, **gets}.items():
            # HEAD is what load balancers and link checkers ask.
            methods = ["GET", "HEAD"] if path in gets else ["POST"]
            routes.add_api_route(path, endpoint, methods=methods)
            routes.add_api_route(path, _options, methods=["OPTIONS"])
        doors = self._doors
        self._access = Access(routes, doors.key_digests, doors.cors_origins, doors.access_log)
        return self._access

    async def drain(self, wait_s: float) -> None:
        """Return when nothing is in hand, or after so long; before the service ends.

        What the proxy had passed on by now is still taken; what comes later is refused, so that
        there is an end.
        """
        clock = asyncio.get_running_loop().time
        began = quiet_since = clock()
        while clock() < began + wait_s and clock() < quiet_since + _QUIET_S:
            self._access.is_closed = clock() > began + _LATECOMERS_S
            await asyncio.sleep(0.02)
            if self._access.in_hand:
                quiet_since = clock()

    async def generations(self, request: Request) -> Response:
        """Images as base64 or as links, in JSON."""
        order = await self._accept(request)
        deadline = self._deadline()
        files = await self._make(order, deadline)
        if order.as_url:
            urls = await self._upload(order, files, deadline)
            data = [{"url": url, "index": k} for k, url in enumerate(urls)]
        else:
            data = [
                {"b64_json": base64.b64encode(file).decode("ascii"), "index": k}
                for k, file in enumerate(files)
            ]
        facts = {
            "model": order.model,
            "seed": order.seed,
            "seed_str": str(order.seed),  # JavaScript rounds numbers beyond 2^53
            "steps": order.steps,
            "size": self._doors.cards[order.model].size,
            "output_format": order.output_format,
        }
        made = {"created": int(time.time()), "data": data, **facts}
        return _json(made, {**NO_STORE, "x-ddray-seed": str(order.seed)})

    async def raw(self, request: Request) -> Response:
        """One image as the bytes of a file."""
        order = await self._accept(request)
        if order.n != 1:
            message = f"n={order.n} is not allowed: /v1/images/raw gives one image; leave n out"
            raise RequestError(400, message, "invalid_value", "n")
        if order.as_url:
            message = 'response_format="url" is not allowed: /v1/images/raw gives the bytes'
            raise RequestError(400, message, "invalid_value", "response_format")
        (file,) = await self._make(order, self._deadline())
        headers = {"x-ddray-seed": str(order.seed), **NO_STORE}
        return Response(file, media_type=MEDIA_TYPES[order.output_format], headers=headers)

    async def models(self) -> Response:
        """The served students and what may be asked of them."""
        entries = [card.entry() for card in self._doors.cards.values()]
        return _json({"object": "list", "data": entries})

    async def model(self, model: str) -> Response:
        """One of them."""
        return _json(find_card(model, self._doors.cards).entry())

    async def healthz(self) -> Response:
        """Whether this process answers."""
        return _json({"status": "ok"})

    async def readyz(self) -> Response:
        """Whether a warm student answers, or one would be started."""
        now = asyncio.get_running_loop().time()
        # Under load, the question would wait behind the requests that answer it.
        if not self._doors.may_sleep and now - self._answered_at > _FRESH_S:
            deadline = now + _PROBE_TIMEOUT_S
            await self._ask(self._replicas.ready, deadline, "no student is ready yet", "not_ready")
        return _json({"status": "ready"})

    async def openapi(self, request: Request) -> Response:
        """The interface as an OpenAPI schema."""
        prefix = request.scope.get("root_path", "")
        return _json({**self._schema, "servers": [{"url": prefix}]} if prefix else self._schema)

    async def page(self) -> Response:
        """A page to try it."""
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def _accept(self, request: Request) -> Order:
        parsed = parse_request(await _read_body(request))
        order = check_request(parsed, self._doors.cards, urls=self._links is not None)
        request.state.details.update(order.logged(self._doors.log_prompts))
        return order

    def _deadline(self) -> float:
        """Until when a request that is accepted now must be answered, in the loop's time."""
        return asyncio.get_running_loop().time() + self._timeout_s

    async def _make(self, order: Order, deadline: float) -> list[bytes]:
        clock, door = asyncio.get_running_loop().time, self._admission
        if not door.enter(order.n, clock()):
            raise RequestError(
                503,
                f"the service is busy: {door.images} images are being made and at most "
                f"{door.room} are admitted; try again",
                "overloaded",
                retry_after_s=1,
            )
        self._admitted_gauge.set(door.images)
        late = f"no images within {self._timeout_s:g} s; ask for fewer, or try again later"
        images: list[bytes] | None = None
        try:
            images = await self._ask(self._handles[order.model], deadline, late, "timeout", order)
            self._answered_at = clock()
            return images
        finally:
            door.leave(order.n, images is not None, clock())
            self._admitted_gauge.set(door.images)

    async def _ask(
        self, method: DeploymentHandle, deadline: float, late: str, code: str, *args: object
    ) -> Any:
        """Call a replica, and another one where that is lost: images can be made again.

        Raises:
            RequestError: 504, or 503 where it is no timeout of images, after the deadline; 503
                where the queue is full or the service is being deployed anew.
        """
        loop = asyncio.get_running_loop()
        while True:
            response = method.remote(*args)
            try:
                async with asyncio.timeout_at(deadline):
                    return await response
            except TimeoutError as error:
                response.cancel()  # the timeout alone would let the replica go on
                status = 504 if code == "timeout" else 503
                raise RequestError(status, late, code, retry_after_s=2) from error
            except asyncio.CancelledError:
                response.cancel()  # the client has left
                raise
            except BackPressureError as error:
                message = "the queue of the service is full; try again"
                raise RequestError(503, message, "overloaded", retry_after_s=1) from error
            except DeploymentUnavailableError as error:
                message = "the students are not to be had; try again"
                raise RequestError(503, message, "not_ready", retry_after_s=2) from error
            except (ReplicaUnavailableError, RayActorError) as error:
                if loop.time() + _RETRY_AFTER_LOSS_S > deadline:
                    message = "the replica with this request was lost; try again"
                    raise RequestError(503, message, "replica_lost", retry_after_s=2) from error
                self._retries.inc()
                await asyncio.sleep(_RETRY_AFTER_LOSS_S)

    async def _upload(self, order: Order, files: Sequence[bytes], deadline: float) -> list[str]:
        """Links to the files, which lie in storage under their sha256."""
        assert self._links is not None
        storage, expires_s = self._links, self._doors.url_expires_s
        kind = order.output_format

        def upload(file: bytes) -> str:
            name = f"{hashlib.sha256(file).hexdigest()}.{kind}"
            storage.write(name, file)
            return storage.link(name, expires_s, MEDIA_TYPES[kind])

        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.gather(*(asyncio.to_thread(upload, file) for file in files))
        except (StorageError, TimeoutError) as error:
            log.error("cannot store images: %s", error or "the request's time is over")
            message = "the images cannot be stored for now; ask for b64_json, or try again"
            raise RequestError(503, message, "storage_unavailable", retry_after_s=5) from error

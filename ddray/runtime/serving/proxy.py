"""What Serve's own HTTP proxy must be told, so that it neither breaks nor speaks in plain text.

A node's Ray must have been started with `SERVE_ENVIRONMENT`.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from ray.serve import metrics
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddray.config.serving import MAX_IMAGES
from ddray.runtime.serving.access import (
    EXPOSED,
    NEXT_TO_NOTHING,
    SIGN,
    answer,
    is_request_id,
    too_large,
)
from ddray.runtime.serving.http_protocol import limit_connections
from ddray.serving.admission import Window
from ddray.serving.api import MAX_BODY_BYTES, RequestError
from ddray.serving.schema import GENERATIONS, RAW

log = logging.getLogger("ray.serve")

# By these a client could steer to which replica Serve sends it, have its request kept after it has
# left, or for ever; of other bytes than UTF-8 in the first, as in x-request-id, the proxy dies with
# a plain 500.
_STEERING = {
    b"serve_multiplexed_model_id",
    b"x_session_id",
    b"x_request_disconnect_disabled",
    b"x_request_timeout_seconds",
}
_SERVES_OWN = "/-/"
_TAKE_IMAGES = {GENERATIONS, RAW}
# For a body to come, and for the rest of one that is too large, which is read before it is refused,
# since a client that is still sending may never read the answer.
_BODY_S, _DRAIN_S = 5.0, 20.0
_BUSY = RequestError(503, "the service is busy; try again", "overloaded", retry_after_s=1)
_LOST = RequestError(
    503, "the front of the service was lost; try again", "unavailable", retry_after_s=2
)
# Of answers to scripts of other pages.
_LEAVE, _MOST_ORIGINS = b"access-control-allow-origin", 100


def middlewares() -> list[Middleware]:
    """For Serve, which finds this function by its environment and calls it before it listens."""
    limit_connections()
    return [Middleware(Guard)]


class Guard:
    """ASGI middleware around Serve's proxy.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        # A request that is passed on to be refused takes more of a busy machine than its images
        # would, and waits for its refusal behind all others.
        self._window = Window()
        self._refused = metrics.Counter("ddray_refused_total", "Requests refused at the door.")
        self._refused.inc(NEXT_TO_NOTHING)
        # To whose pages the front gives leave, as its answers tell.
        self._origins: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if _keep(name, value)]
        if not scope["path"].startswith("/"):  # of no application: "*"
            await self._beside_all(scope, receive, send)
        elif scope["path"] in _TAKE_IMAGES and scope["method"] == "POST":
            await self._admit(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _beside_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS":
            headers = {"Allow": "GET, HEAD, OPTIONS, POST"}
            await Response(status_code=204, headers=headers)(scope, receive, send)
            return
        message = f"{scope['method']} {scope['path'][:80]!r} does not exist; paths begin with '/'"
        await self._answer(RequestError(404, message, "not_found"), scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for images, which counts from when it is there until its answer is."""
        try:
            body = await _read(receive)
        except RequestError as error:
            await self._answer(error, scope, receive, send)
            return
        if body is None:
            return
        images = _images_of(body)
        if not self._window.enter(images, time.monotonic()):
            self._refused.inc()
            await self._answer(_BUSY, scope, receive, send)
            return
        with ExitStack() as inside:
            inside.callback(self._window.leave, images)
            watched = self._watched(send, images, inside.close)
            await self._pass_on(scope, _replayed(body, receive), watched)

    def _watched(self, send: Send, images: int, leave: Callable[[], None]) -> Send:
        """Learn from an answer how many images may be asked for."""
        began, together, window = time.monotonic(), self._window.images, self._window

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Not when its client has read it all, which may take long.
                leave()
                if _is_overload(message):
                    window.refused(together, began, time.monotonic())
                elif message["status"] == 200:
                    window.made(images, time.monotonic())
            await send(message)

        return sending

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = replaced = False

        async def sending(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                error = _reworded(message)
                if error is not None:
                    replaced = True
                    await self._answer(error, scope, receive, send, _request_id(message))
                self._note_origin(message)
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:  # else the HTTP server would answer, in plain text
            log.warning("Serve's proxy raised", exc_info=True)
            if started:
                raise
        if not started:  # as when an ingress dies
            await self._answer(_LOST, scope, receive, send)

    async def _answer(
        self, error: RequestError, scope: Scope, receive: Receive, send: Send, request_id: str = ""
    ) -> None:
        """Word an error as the front would: with an id, and for pages that may read it."""
        given = dict(scope["headers"])
        request_id = request_id or given.get(b"x-request-id", b"").decode() or uuid.uuid4().hex
        headers = {"x-request-id": request_id}
        leave = {given.get(b"origin", b""), b"*"} & self._origins
        if leave:
            headers |= {_LEAVE.decode(): leave.pop().decode("latin-1"), "vary": "Origin"}
            headers["access-control-expose-headers"] = ", ".join(EXPOSED)
        if error.status == 408:  # else what is still to come would be read as the next request
            headers["connection"] = "close"
        await answer(error, headers)(scope, receive, send)

    def _note_origin(self, start: Message) -> None:
        leave = dict(start["headers"]).get(_LEAVE)
        if leave is not None and len(self._origins) < _MOST_ORIGINS:
            self._origins.add(leave)


def _keep(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        return is_request_id(value.decode("latin-1"))
    return name.replace(b"-", b"_") not in _STEERING


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None = the client has left.

    Raises:
        RequestError: 408 for one that does not come, 413 for one that is too large.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S) as limit:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                if len(body) <= MAX_BODY_BYTES:
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY_BYTES:
                        limit.reschedule(asyncio.get_running_loop().time() + _DRAIN_S)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        if len(body) <= MAX_BODY_BYTES:
            late = f"the body did not come within {_BODY_S:g} s; send it at once"
            raise RequestError(408, late, "request_timeout") from None
    if len(body) > MAX_BODY_BYTES:
        raise too_large()
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What is received, with a body that has been read put back before it."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def receiving() -> Message:
        nonlocal first
        message, first = first, None
        return message or await receive()

    return receiving


def _images_of(body: bytes) -> int:
    """How many images a request asks for; the front says what is wrong with it."""
    try:
        n = int(json.loads(body)["n"])  # 16.0 and "16" are 16 too
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return 1
    return min(max(n, 1), MAX_IMAGES)


def _is_overload(start: Message) -> bool:
    # Other refusals of the ingress ask for more patience than a second.
    return start["status"] == 503 and (b"retry-after", b"1") in start["headers"]


def _reworded(start: Message) -> RequestError | None:
    """An answer of Serve's own as the service would word it; None = it is an application's."""
    headers, status = dict(start["headers"]), start["status"]
    plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    if status < 400 or not plain or SIGN in headers:
        return None
    log.warning("Serve itself answered with %d", status)
    if status == 408:
        return RequestError(504, "no answer in time; try again later", "timeout", retry_after_s=2)
    if status == 404:
        return RequestError(503, "nothing is served now; try again", "not_ready", retry_after_s=2)
    if status == 429:
        return _BUSY
    # Serve has no other refusal.
    return _LOST if status >= 500 or status == 499 else None


def _request_id(start: Message) -> str:
    return dict(start["headers"]).get(b"x-request-id", b"").decode("latin-1")

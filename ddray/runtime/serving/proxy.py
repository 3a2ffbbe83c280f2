"""What Serve's own HTTP proxy must be told, so that it neither breaks nor speaks in plain text.

A node's Ray must have been started with `SERVE_ENVIRONMENT`.
"""

import logging
import math
import time

from ray.serve import metrics
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddray.runtime.serving.access import answer, is_request_id
from ddray.serving.api import RequestError

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
# How the number of requests that are passed on at a time is found, as TCP finds its window: each
# refusal of the ingress lowers it by a factor, and each window of answers raises it by a tenth, but
# no less than so many.
_LOWER, _RAISE, _LEAST_RAISE = 0.8, 0.1, 4.0
# Made once: refusing must cost as little as can be.
_BUSY = answer(RequestError(503, "the service is busy; try again", "overloaded", retry_after_s=1))
_LOST = RequestError(
    503, "the front of the service was lost; try again", "unavailable", retry_after_s=2
)


def middlewares() -> list[Middleware]:
    """For Serve, which finds this function by its environment."""
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
        self._in_flight, self._window, self._lowered_at = 0, math.inf, -math.inf
        self._refused = metrics.Counter("ddray_refused_total", "Requests refused at the door.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if _keep(name, value)]
        if not _asks_for_images(scope):
            await self._pass_on(scope, receive, send)
            return
        if self._in_flight >= self._window:
            self._refused.inc()
            await _BUSY(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._pass_on(scope, receive, self._watched(send))
        finally:
            self._in_flight -= 1

    def _watched(self, send: Send) -> Send:
        """Learn from an answer how many requests may be passed on."""
        began, others = time.monotonic(), self._in_flight

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Once for all that were on their way together.
                if _is_overload(message) and began > self._lowered_at:
                    self._window = max(1.0, _LOWER * min(others, self._window))
                    self._lowered_at = time.monotonic()
                elif message["status"] == 200:
                    self._window += max(_RAISE, _LEAST_RAISE / self._window)
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
                    await answer(error, _request_id(message))(scope, receive, send)
            if not replaced:
                await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:  # else the HTTP server would answer, in plain text
            log.warning("Serve's proxy raised", exc_info=True)
            if started:
                raise
        if not started:  # as when an ingress dies
            await answer(_LOST)(scope, receive, send)


def _keep(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        return is_request_id(value.decode("latin-1"))
    return name.replace(b"-", b"_") not in _STEERING


def _asks_for_images(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith("/v1/images/")


def _is_overload(start: Message) -> bool:
    # Other refusals of the ingress ask for more patience than a second.
    return start["status"] == 503 and (b"retry-after", b"1") in start["headers"]


def _reworded(start: Message) -> RequestError | None:
    """An answer of Serve's own as the service would word it; None = it is the service's."""
    kind = dict(start["headers"]).get(b"content-type", b"")
    status = start["status"]
    if status < 400 or not kind.startswith(b"text/plain"):
        return None
    log.warning("Serve itself answered with %d", status)
    if status == 408:
        return RequestError(504, "no answer in time; try again later", "timeout", retry_after_s=2)
    if status == 404:
        return RequestError(503, "nothing is served now; try again", "not_ready", retry_after_s=2)
    return _LOST


def _request_id(start: Message) -> dict[str, str]:
    return {
        name.decode(): value.decode("latin-1")
        for name, value in start["headers"]
        if name == b"x-request-id"
    }

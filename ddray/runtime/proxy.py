"""What Serve's own HTTP proxy must be told, so that it neither breaks nor speaks in plain text.

A node's Ray must have been started with `SERVE_ENVIRONMENT`. Imports ddray.serving_api and
runtime.access.
"""

import logging
import math
import time

from ray.serve import metrics
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddray.runtime.access import answer, is_request_id
from ddray.serving_api import RequestError

log = logging.getLogger("ray.serve")

# By these a client could steer to which replica Serve sends it; of other bytes than UTF-8 in them,
# as in x-request-id, the proxy dies with a plain 500.
_STEERING = {b"serve_multiplexed_model_id", b"x_session_id"}
_SERVES_OWN = "/-/"
# For so long after a refusal others are refused here: passing each on would take more of a busy
# machine than making its images. Far shorter than the queue, so no device runs dry.
_CLOSED_S = 0.05
_BUSY = RequestError(503, "the service is busy; try again", "overloaded", retry_after_s=1)


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
        self._closed_until = -math.inf
        self._refused = metrics.Counter(
            "ddray_refused_total", "Requests refused by the proxy.", tag_keys=("application",)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVES_OWN):
            await self._app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if _keep(name, value)]
        if time.monotonic() < self._closed_until and _asks_for_images(scope):
            self._refused.inc(1, {"application": "ddray"})
            await answer(_BUSY)(scope, receive, send)
            return
        replaced = False

        async def sending(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                if _is_overload(message) and _asks_for_images(scope):
                    self._closed_until = time.monotonic() + _CLOSED_S
                error = _reworded(message)
                if error is not None:
                    replaced = True
                    await answer(error, _request_id(message))(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, sending)


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
        return RequestError(503, "nothing is served yet; try again", "not_ready", retry_after_s=2)
    message = "the front of the service was lost, or is at its limit; try again"
    return RequestError(503, message, "unavailable", retry_after_s=1)


def _request_id(start: Message) -> dict[str, str]:
    return {
        name.decode(): value.decode("latin-1")
        for name, value in start["headers"]
        if name == b"x-request-id"
    }

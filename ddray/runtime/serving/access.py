"""What every request to the image service passes before its route: keys, headers, log, metrics."""

import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ray.serve import metrics
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddray.serving.api import RequestError
from ddray.serving.api_keys import is_known

_SECONDS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

log = logging.getLogger("ray.serve.access")


def answer(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """An error as the service words it."""
    return Response(
        error.body(),
        status_code=error.status,
        headers={**error.headers, **(headers or {})},
        media_type="application/json",
    )


class Access:
    """ASGI middleware around the routes.

    Args:
        app: the routes.
        key_digests: of the keys that open /v1; none = open to all.
        cors_origins: of pages elsewhere whose scripts may call.
        log_requests: whether each request leaves a line in the log.
    """

    def __init__(
        self,
        app: ASGIApp,
        key_digests: Sequence[str],
        cors_origins: Sequence[str],
        log_requests: bool,
    ):
        self._routes = app
        self._digests, self._log_requests = key_digests, log_requests
        self._app: ASGIApp = self._guarded(app)
        if cors_origins:
            self._app = CORSMiddleware(
                self._app,
                allow_origins=cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
                expose_headers=["x-request-id", "x-ddray-seed", "retry-after"],
            )
        self._requests = metrics.Counter(
            "ddray_requests_total", "HTTP requests.", tag_keys=("route", "status")
        )
        self._seconds = metrics.Histogram(
            "ddray_request_seconds",
            "From a request to the end of its answer.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # a client that left before its answer
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = _request_id(given)
        details: dict[str, Any] = {}
        scope.setdefault("state", {})["details"] = details

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if not given:  # else Serve's proxy, which gave it, tells the client too
                    headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            # What is no route of ours is one series, however many paths are tried.
            route = getattr(scope.get("route"), "path", "other")
            self._requests.inc(1, {"route": route, "status": str(status)})
            self._seconds.observe(seconds, {"route": route})
            if self._log_requests:
                line = {
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "ms": round(seconds * 1000, 1),
                    "client": (scope.get("client") or ("",))[0],
                    **details,
                }
                log.info("%s", json.dumps(line))

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """The routes, of which /v1 asks for a key."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            given = Headers(scope=scope).get("authorization", "")
            if self._digests and path.startswith("/v1/") and not is_known(given, self._digests):
                what = "not known here" if given else "missing"
                message = f"the API key is {what}; send it as 'Authorization: Bearer KEY'"
                refusal = answer(
                    RequestError(401, message, "invalid_api_key"), {"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, send)
                return
            await app(scope, receive, send)

        return guarded


def is_request_id(given: str) -> bool:
    """Whether a client's own id of a request is fit for a log."""
    return re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) is not None


def _request_id(given: str) -> str:
    return given if is_request_id(given) else uuid.uuid4().hex

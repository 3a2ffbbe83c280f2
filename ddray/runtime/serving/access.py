"""What every request to the image service passes before its route: keys, headers, log, metrics."""

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

from ddray.runtime.serving.logs import log_access, open_access_log
from ddray.serving.api import MAX_BODY_BYTES, RequestError
from ddray.serving.api_keys import is_known

_SECONDS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
SIGN = b"x-content-type-options"
"""A header that every answer of the service has, and none that Serve gives by itself."""
EXPOSED = ("x-request-id", "x-ddray-seed", "retry-after")
"""Headers of answers that scripts of other pages may read."""
NO_STORE = {"Cache-Control": "no-store"}
"""Of answers that are good for one request alone."""
NEXT_TO_NOTHING = 5e-324
"""By which a counter is begun, so that there is one before what it counts; Ray refuses 0."""

_ENDING = RequestError(503, "the service is stopping", "not_ready", retry_after_s=2)


def answer(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """An error as the service words it."""
    return Response(
        error.body(),
        status_code=error.status,
        headers={**_HEADERS, **NO_STORE, **error.headers, **(headers or {})},
        media_type="application/json",
    )


def too_large() -> RequestError:
    """What a body that is too large is answered."""
    message = f"the body has more than {MAX_BODY_BYTES} bytes, the most that is allowed"
    return RequestError(413, message, "request_too_large")


class Leave(CORSMiddleware):
    """Leave for scripts of other pages; what is refused is worded as all else."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            # Clients name themselves in headers of their own (x-stainless-os), and a page that may
            # call gains nothing by any header.
            allow_headers=["*"],
            expose_headers=EXPOSED,
            # The operator has named the page, wherever it lies.
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser's question."""
        given = super().preflight_response(request_headers)
        if given.status_code < 400:
            return given
        origin = request_headers["origin"][:200]
        method = request_headers["access-control-request-method"][:20]
        if self.is_allowed_origin(origin):
            what = f"method {method!r} is not allowed; use {' or '.join(self.allow_methods)}"
        else:
            what = f"origin {origin!r} is not allowed; --cors-origins names those that are"
        kept = {
            name: given.headers[name]
            for name in given.headers
            if name.startswith(("access-control-", "vary"))
        }
        return answer(RequestError(400, what, "cors_refused"), kept)


class Access:
    """ASGI middleware around the routes.

    Args:
        app: the routes.
        key_digests: of the keys that open /v1; none = open to all.
        cors_origins: of pages elsewhere whose scripts may call.
        log_requests: whether each request leaves a line in the log.

    Attributes:
        in_hand: requests whose answer has not ended.
        is_closed: whether what comes is refused, as the service ends.
    """

    def __init__(
        self,
        app: ASGIApp,
        key_digests: Sequence[str],
        cors_origins: Sequence[str],
        log_requests: bool,
    ):
        self.in_hand, self.is_closed = 0, False
        self._routes = app
        self._digests, self._log_requests = key_digests, log_requests
        if log_requests:
            open_access_log()
        self._app: ASGIApp = self._guarded(app)
        if cors_origins:
            self._app = Leave(self._app, cors_origins)
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
        self.in_hand += 1
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
            self.in_hand -= 1
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
                log_access(line)

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """The routes, of which /v1 asks for a key."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if self.is_closed:
                await answer(_ENDING)(scope, receive, send)
                return
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

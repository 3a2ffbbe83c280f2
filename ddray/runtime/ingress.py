"""The HTTP front of the image service: routes, limits, admission, timeouts, wording of errors.

All of them lie below Serve's own limits, whose answers are plain text.
Imports ddray.serving_api.
"""

import asyncio
import base64
import hashlib
import re
import time
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from ddray.serving_api import (
    MAX_BODY_BYTES,
    ModelCard,
    Order,
    RequestError,
    check_request,
    parse_request,
    to_json,
)

_PROBE_TIMEOUT_S = 2.0
# A body that is too large is read to its end before it is refused, since a client that is still
# sending may never read the answer; but not without end.
_MAX_DRAINED_BYTES = 64_000_000
_NO_SNIFF = {"X-Content-Type-Options": "nosniff"}

# FastAPI's own pages load scripts from elsewhere, hence off.
app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


def _json(value: object) -> Response:
    return Response(to_json(value), media_type="application/json", headers=_NO_SNIFF)


def _answer(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        error.body(),
        status_code=error.status,
        headers={**_NO_SNIFF, **error.headers, **(headers or {})},
        media_type="application/json",
    )


@app.exception_handler(RequestError)
async def _refused(request: Request, error: RequestError) -> Response:
    return _answer(error)


@app.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> Response:
    path = f"{request.method} {request.url.path[:80]!r}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        known = "POST /v1/images/generations, POST /v1/images/raw, GET /v1/models"
        message, code = f"{path} does not exist; there are {known}", "not_found"
    elif error.status_code == 405:
        message = f"{path} is not allowed; use {headers.get('Allow', 'another method')}"
        code = "method_not_allowed"
    else:
        message, code = f"{path}: {error.detail}", "bad_request"
    return _answer(RequestError(error.status_code, message, code), headers)


@app.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so Serve logs the traceback.
    return _answer(RequestError(500, "the service failed; its log says why", "internal_error"))


def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, which allow its inline script and style by hash and no other."""
    text = resources.files("ddray.runtime").joinpath("page.html").read_text("utf-8")
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
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", **_NO_SNIFF}
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
        message = f"the body has more than {MAX_BODY_BYTES} bytes, the most that is allowed"
        raise RequestError(413, message, "request_too_large")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"content-type {kind[:80]!r} is not supported; send application/json"
        raise RequestError(415, message, "unsupported_media_type")
    return bytes(body)


@serve.ingress(app)
class Ingress:
    """Checks requests, admits as many as can be served in time, and words every error.

    Args:
        student: handle of the replicas.
        request_timeout_s: longest time from a request to its images.
        max_images: most images that are admitted at a time.
    """

    def __init__(self, student: DeploymentHandle, request_timeout_s: float, max_images: int):
        self._student = student
        self._timeout_s = request_timeout_s
        self._max_images = max_images
        self._admitted = 0
        self._card: ModelCard | None = None
        self._page, self._page_headers = _page()

    @app.post("/v1/images/generations")
    async def generations(self, request: Request) -> Response:
        """Images as base64 in JSON."""
        card, order = await self._accept(request)
        images = await self._make(order)
        data = [
            {"b64_json": base64.b64encode(png).decode("ascii"), "index": k}
            for k, png in enumerate(images)
        ]
        answer = {"created": int(time.time()), "data": data, "seed": order.seed, "model": card.id}
        return _json({**answer, "steps": order.steps, "size": card.size, "output_format": "png"})

    @app.post("/v1/images/raw")
    async def raw(self, request: Request) -> Response:
        """One image as the bytes of a PNG file."""
        card, order = await self._accept(request)
        if order.n != 1:
            message = f"n={order.n} is not allowed: /v1/images/raw gives one image; leave n out"
            raise RequestError(400, message, "invalid_value", "n")
        (png,) = await self._make(order)
        headers = {"x-ddray-seed": str(order.seed), **_NO_SNIFF}
        return Response(png, media_type="image/png", headers=headers)

    @app.get("/v1/models")
    async def models(self) -> Response:
        """The served student and what may be asked of it."""
        card = await self._model_card()
        return _json({"object": "list", "data": [card.entry()]})

    @app.get("/healthz")
    async def healthz(self) -> Response:
        """Whether this process answers."""
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Whether a warm student answers."""
        await self._ask("card", _PROBE_TIMEOUT_S)
        return _json({"status": "ready"})

    @app.get("/")
    async def page(self) -> Response:
        """A page to try it."""
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def _accept(self, request: Request) -> tuple[ModelCard, Order]:
        parsed = parse_request(await _read_body(request))
        card = await self._model_card()
        return card, check_request(parsed, card)

    async def _model_card(self) -> ModelCard:
        if self._card is None:
            self._card = await self._ask("card", _PROBE_TIMEOUT_S)
        return self._card

    async def _make(self, order: Order) -> list[bytes]:
        if self._admitted + order.n > self._max_images:
            raise RequestError(
                503,
                f"the service is busy: {self._admitted} images are being made and at most "
                f"{self._max_images} are admitted; try again",
                "overloaded",
                retry_after_s=1,
            )
        self._admitted += order.n
        try:
            images: list[bytes] = await self._ask("images", self._timeout_s, order.jobs())
            return images
        finally:
            self._admitted -= order.n

    async def _ask(self, method: str, timeout_s: float, *args: object) -> Any:
        """Call a replica.

        Raises:
            RequestError: 503 where none is there, 504 where it takes too long; try again later.
        """
        response = getattr(self._student, method).remote(*args)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError as error:
            response.cancel()  # the timeout alone would let the replica go on
            if method == "images":
                message = f"no images within {timeout_s:g} s; ask for fewer, or try again later"
                raise RequestError(504, message, "timeout", retry_after_s=5) from error
            message = "no student is ready yet; try again"
            raise RequestError(503, message, "not_ready", retry_after_s=2) from error
        except BackPressureError as error:
            message = "the queue of the service is full; try again"
            raise RequestError(503, message, "overloaded", retry_after_s=1) from error
        except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
            message = "the replica with this request was lost; try again"
            raise RequestError(503, message, "replica_lost", retry_after_s=2) from error

"""What surrounds Serve's HTTP proxy, around a proxy of the test's own."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from ddray.runtime.access import answer
from ddray.runtime.cluster import SERVE_ENVIRONMENT
from ddray.runtime.proxy import Guard, middlewares
from ddray.serving_api import RequestError

pytestmark = pytest.mark.ray

RAW = "/v1/images/raw"
FULL_QUEUE = RequestError(503, "full", "overloaded", retry_after_s=1)


class Proxy:
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self, reply: Response | Exception):
        self.reply = reply
        self.headers: dict[bytes, bytes] = {}
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = dict(scope["headers"])
        self.asked += 1
        await self.open.wait()
        if isinstance(self.reply, Exception):
            raise self.reply
        await self.reply(scope, receive, send)


def _client(proxy: Proxy) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Guard(proxy)), base_url="http://x")


def _post(proxy: Proxy, **headers: bytes) -> httpx.Response:
    async def post() -> httpx.Response:
        async with _client(proxy) as client:
            return await client.post(
                RAW, headers=[(name.encode(), value) for name, value in headers.items()]
            )

    return asyncio.run(post())


def test_serve_finds_it_by_its_environment() -> None:
    path = SERVE_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    assert path == f"{middlewares.__module__}:{middlewares.__name__}"
    assert [middleware.cls for middleware in middlewares()] == [Guard]


def test_headers_that_steer_or_break_serve_do_not_reach_it() -> None:
    proxy = Proxy(Response(b"image", media_type="image/png"))
    given = {"serve-multiplexed-model-id": b"a", "serve_multiplexed_model_id": b"a"}
    sent = {"x-session-id": b"b", "x-request-id": b"\xff", "origin": b"kept", **given}
    assert _post(proxy, **sent).content == b"image"
    assert not {name for name in proxy.headers if b"serve" in name or b"session" in name}
    assert b"x-request-id" not in proxy.headers
    assert proxy.headers[b"origin"] == b"kept"
    _post(proxy, **{"x-request-id": b"job-7"})
    assert proxy.headers[b"x-request-id"] == b"job-7"


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (PlainTextResponse("Internal Server Error", 500), 503, "unavailable"),
        (PlainTextResponse("timed out", 408), 504, "timeout"),
        (PlainTextResponse("no route", 404), 503, "not_ready"),
        (RuntimeError("the ingress died"), 503, "unavailable"),
    ],
)
def test_serves_own_answers_are_reworded(
    reply: Response | Exception, status: int, code: str
) -> None:
    got = _post(Proxy(reply))
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)
    assert set(got.json()["error"]) == {"message", "type", "code", "param"}
    assert "retry-after" in got.headers


def test_answers_of_the_service_and_health_checks_of_serve_pass_untouched() -> None:
    ours = _post(Proxy(answer(RequestError(400, "no", "invalid_value", "n"))))
    assert (ours.status_code, ours.json()["error"]["param"]) == (400, "n")

    async def health() -> httpx.Response:
        async with _client(Proxy(PlainTextResponse("draining", 503))) as client:
            return await client.get("/-/healthz")

    assert asyncio.run(health()).text == "draining"


def test_after_a_refusal_fewer_requests_are_passed_on_and_after_answers_more() -> None:
    async def together(client: httpx.AsyncClient, proxy: Proxy, count: int) -> int:
        """How many of so many requests at once the proxy is asked."""
        proxy.asked = 0
        proxy.open.clear()
        tasks = [asyncio.create_task(client.post(RAW)) for _ in range(count)]
        await asyncio.sleep(0.05)
        proxy.open.set()
        for got in await asyncio.gather(*tasks):
            if got.status_code == 503:
                assert json.loads(got.content)["error"]["code"] == "overloaded"
                assert got.headers["retry-after"] == "1"
        return proxy.asked

    async def scenario() -> list[Any]:
        made: Response = Response(b"image", media_type="image/png")
        proxy = Proxy(made)
        async with _client(proxy) as client:
            asked = [await together(client, proxy, 100)]
            proxy.reply = answer(FULL_QUEUE)
            asked += [await together(client, proxy, 100) for _ in range(2)]
            proxy.reply = made
            return asked + [await together(client, proxy, 100) for _ in range(9)]

    asked = asyncio.run(scenario())
    # A round of refusals counts once, however many of them there were.
    assert asked[:3] == [100, 100, 80]
    assert asked[3] == 64
    assert asked[3:] == sorted(asked[3:])
    assert asked[-1] == 100

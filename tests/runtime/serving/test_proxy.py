"""What surrounds Serve's HTTP proxy, around a proxy of the test's own."""

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ddray.runtime.cluster.connection import SERVE_ENVIRONMENT
from ddray.runtime.serving.access import answer
from ddray.runtime.serving.proxy import Guard, middlewares
from ddray.serving.api import RequestError

pytestmark = pytest.mark.ray

RAW = "/v1/images/raw"
FULL_QUEUE = RequestError(503, "full", "overloaded", retry_after_s=1)


class Proxy:
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self, reply: ASGIApp | Exception):
        self.reply = reply
        self.headers: dict[bytes, bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = dict(scope["headers"])
        if isinstance(self.reply, Exception):
            raise self.reply
        await self.reply(scope, receive, send)


def _client(proxy: ASGIApp) -> httpx.AsyncClient:
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
    given |= {"x-request-timeout-seconds": b"0", "x-request-disconnect-disabled": b"?1"}
    sent = {"x-session-id": b"b", "x-request-id": b"\xff", "origin": b"kept", **given}
    assert _post(proxy, **sent).content == b"image"
    assert not {name.decode() for name in proxy.headers} & set(sent) - {"origin"}
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
    reply: ASGIApp | Exception, status: int, code: str
) -> None:
    got = _post(Proxy(reply))
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)
    assert set(got.json()["error"]) == {"message", "type", "code", "param"}
    assert "retry-after" in got.headers


def test_no_answer_at_all_is_reworded_too() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        """As Serve's proxy after the death of an ingress."""

    assert _post(Proxy(silent)).json()["error"]["code"] == "unavailable"


def test_answers_of_the_service_and_health_checks_of_serve_pass_untouched() -> None:
    ours = _post(Proxy(answer(RequestError(400, "no", "invalid_value", "n"))))
    assert (ours.status_code, ours.json()["error"]["param"]) == (400, "n")

    async def health() -> httpx.Response:
        async with _client(Proxy(PlainTextResponse("draining", 503))) as client:
            return await client.get("/-/healthz")

    assert asyncio.run(health()).text == "draining"


class Narrow:
    """Refuses what comes while it has its hands full, and keeps the rest until it is told."""

    def __init__(self, room: int):
        self.room, self.asked, self.in_hand = room, 0, 0
        self.done = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if self.in_hand == self.room:
            await answer(FULL_QUEUE)(scope, receive, send)
            return
        self.in_hand += 1
        await self.done.wait()
        self.in_hand -= 1
        await Response(b"image", media_type="image/png")(scope, receive, send)


def test_the_requests_that_are_passed_on_follow_what_is_taken() -> None:
    async def together(client: httpx.AsyncClient, proxy: Narrow) -> tuple[int, int]:
        """Of a hundred requests at once, how many are passed on and how many answered."""
        proxy.asked = 0
        proxy.done.clear()
        tasks = [asyncio.create_task(client.post(RAW)) for _ in range(100)]
        await asyncio.sleep(0.05)
        proxy.done.set()
        made = 0
        for got in await asyncio.gather(*tasks):
            made += got.status_code == 200
            if got.status_code == 503:
                assert got.json()["error"]["code"] == "overloaded"
                assert got.headers["retry-after"] == "1"
        return proxy.asked, made

    async def scenario() -> list[tuple[int, int]]:
        proxy = Narrow(50)
        async with _client(proxy) as client:
            rounds = [await together(client, proxy) for _ in range(12)]
            proxy.room = 100
            return rounds + [await together(client, proxy) for _ in range(10)]

    rounds = asyncio.run(scenario())
    # The first refusal is enough, and from then on hardly any is passed on in vain.
    assert rounds[0] == (51, 50)
    for asked, made in rounds[1:12]:
        assert 40 <= made <= asked <= 51
    assert rounds[-1] == (100, 100)

"""What surrounds Serve's HTTP proxy, around a proxy of the test's own."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddray.runtime.cluster.connection import SERVE_ENVIRONMENT
from ddray.runtime.serving import proxy as proxy_module
from ddray.runtime.serving.access import answer
from ddray.runtime.serving.proxy import Guard, middlewares
from ddray.serving import admission
from ddray.serving.api import RequestError
from tests.patience import PATIENCE_S

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
        (PlainTextResponse("queue full", 429), 503, "overloaded"),
        (PlainTextResponse("no replica", 503), 503, "unavailable"),
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
    for status in (400, 404, 408, 421, 429, 500, 503):
        safe = {"x-content-type-options": "nosniff"}
        said = _post(Proxy(PlainTextResponse("by an application", status, safe)))
        assert (said.status_code, said.text) == (status, "by an application")

    async def health() -> httpx.Response:
        async with _client(Proxy(PlainTextResponse("draining", 503))) as client:
            return await client.get("/-/healthz")

    assert asyncio.run(health()).text == "draining"


def test_what_is_asked_of_the_whole_server_is_no_lost_front() -> None:
    def asked(method: str) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": "*", "headers": []}
        asyncio.run(Guard(Proxy(PlainTextResponse("no route", 404)))(scope, receive, send))
        return sent

    start = asked("OPTIONS")[0]
    assert (start["status"], dict(start["headers"])[b"allow"]) == (204, b"GET, HEAD, OPTIONS, POST")
    start, body = asked("GET")
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (404, "not_found")


def test_pages_that_may_call_may_read_the_refusals_of_the_proxy_too() -> None:
    proxy = Proxy(Response(b"image", headers={"access-control-allow-origin": "https://a"}))

    async def scenario() -> list[httpx.Response]:
        async with _client(proxy) as client:
            await client.post(RAW, headers={"origin": "https://a"})
            proxy.reply = RuntimeError("the ingress died")
            return [await client.post(RAW, headers={"origin": f"https://{x}"}) for x in "ab"]

    named, other = asyncio.run(scenario())
    assert named.status_code == other.status_code == 503
    assert named.headers["access-control-allow-origin"] == "https://a"
    assert "retry-after" in named.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in other.headers


def test_refusals_of_the_proxy_have_an_id_and_safe_headers() -> None:
    for given, told in ({"x-request-id": b"mine-1"}, "mine-1"), ({}, ""):
        headers = _post(Proxy(RuntimeError("the ingress died")), **given).headers
        assert headers["x-request-id"] == told or len(headers["x-request-id"]) == 32 > len(told)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


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


def test_the_requests_that_are_passed_on_follow_what_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "_FORGET_S", PATIENCE_S)

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


async def _body(*parts: bytes, whole: bool = True) -> AsyncIterator[bytes]:
    """A body in parts, whose end may not come."""
    for part in parts:
        yield part
    if not whole:
        await asyncio.Event().wait()


@pytest.mark.parametrize(("stalled", "sent"), [(8, b""), (64, b"{"), (300, b"{" * 60_000)])
def test_requests_whose_body_does_not_come_refuse_nobody(
    monkeypatch: pytest.MonkeyPatch, stalled: int, sent: bytes
) -> None:
    monkeypatch.setattr(proxy_module, "_BODY_S", 0.2)

    async def scenario() -> tuple[list[httpx.Response], list[httpx.Response]]:
        proxy = Narrow(8)
        async with _client(proxy) as client:
            # An overload first: what may be passed on is known to be eight.
            many = [asyncio.create_task(client.post(RAW)) for _ in range(100)]
            await asyncio.sleep(0.05)
            proxy.done.set()
            await asyncio.gather(*many)
            bodies = [_body(sent, whole=False) for _ in range(stalled)]
            tasks = [asyncio.create_task(client.post(RAW, content=body)) for body in bodies]
            await asyncio.sleep(0.05)
            good = [await client.post(RAW, json={"prompt": 1}) for _ in range(3)]
            return good, list(await asyncio.gather(*tasks))

    good, late = asyncio.run(scenario())
    assert [got.status_code for got in good] == [200] * 3
    for got in late:
        assert (got.status_code, got.json()["error"]["code"]) == (408, "request_timeout")
        assert got.headers["connection"] == "close"


def test_clients_that_do_not_read_their_answer_refuse_nobody() -> None:
    async def scenario() -> int:
        proxy = Narrow(8)
        guard, still = Guard(proxy), asyncio.Event()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(guard), base_url="http://x"
        ) as client:
            many = [asyncio.create_task(client.post(RAW)) for _ in range(100)]
            await asyncio.sleep(0.05)
            proxy.done.set()
            await asyncio.gather(*many)

            async def receive() -> Message:
                return {"type": "http.request", "body": b"{}", "more_body": False}

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await still.wait()

            slow = []
            for _ in range(50):
                scope = {"type": "http", "method": "POST", "path": RAW, "headers": []}
                slow.append(asyncio.create_task(guard(scope, receive, send)))
                await asyncio.sleep(0.001)
            answer = await client.post(RAW)
            still.set()
            await asyncio.gather(*slow)
            return answer.status_code

    assert asyncio.run(scenario()) == 200


def test_after_an_overload_and_silence_a_burst_meets_no_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "_FORGET_S", 0.3)

    async def scenario() -> list[int]:
        proxy = Narrow(12)
        async with _client(proxy) as client:
            body = {"prompt": 1, "n": 16}
            for _ in range(5):
                proxy.done.clear()
                many = [asyncio.create_task(client.post(RAW, json=body)) for _ in range(36)]
                await asyncio.sleep(0.05)
                proxy.done.set()
                await asyncio.gather(*many)
            await asyncio.sleep(0.4)
            proxy.room = 96
            burst = [client.post(RAW, json={"prompt": 1}) for _ in range(96)]
            return [answer.status_code for answer in await asyncio.gather(*burst)]

    assert asyncio.run(scenario()) == [200] * 96


@pytest.mark.parametrize(
    ("body", "images"),
    [
        (b'{"n": 16}', 16),
        (b'{"prompt": "n", "n":3}', 3),
        (b'{"n": 17}', 16),
        (b'{"n": -1}', 1),
        (b'{"n": "4"}', 4),
        (b'{"n": 16.0}', 16),
        (b'{"n": Infinity}', 1),
        (b'{"n": null}', 1),
        (b"{}", 1),
        (b"[16]", 1),
        (b'{"n":', 1),
        (b"\xff", 1),
        (b"[" * 60_000, 1),
        (b'{"n": ' + b"9" * 5000 + b"}", 1),
    ],
)
def test_a_request_counts_by_its_images(body: bytes, images: int) -> None:
    assert proxy_module._images_of(body) == images


def test_the_body_reaches_the_front_whole() -> None:
    got: list[bytes] = []

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await Request(scope, receive).body())
        await Response(b"image")(scope, receive, send)

    async def post(*parts: bytes) -> httpx.Response:
        async with _client(front) as client:
            return await client.post(RAW, content=_body(*parts))

    assert asyncio.run(post(b'{"a"', b"", b": 1}")).content == b"image"
    assert got == [b'{"a": 1}']
    large = asyncio.run(post(*[b" " * 50_000] * 20))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    assert len(got) == 1


def test_who_leaves_before_the_body_is_there_is_passed_to_nobody() -> None:
    async def scenario() -> list[Message]:
        sent: list[Message] = []
        messages: list[Message] = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": RAW, "headers": []}
        await Guard(Proxy(RuntimeError("asked")))(scope, receive, send)
        return sent

    assert asyncio.run(scenario()) == []

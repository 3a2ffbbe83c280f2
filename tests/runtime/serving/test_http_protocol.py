"""What a connection may cost, on a real uvicorn that serves as Serve's proxy has it serve."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator

import psutil
import pytest
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ddray.runtime.serving import http_protocol
from ddray.runtime.serving.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, limit_connections
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.ray

GET = b"GET /x HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /x HTTP/1.1\r\nhost: x\r\n"
ENOUGH = 3 * MAX_HEAD_BYTES


async def _told(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells how many bytes of body and headers came."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    told = {"body": size, "headers": len(scope["headers"])}
    await JSONResponse(told)(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    limit_connections()
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        _told, lifespan="off", log_config=None, access_log=False, timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    running = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    running.start()
    wait_until(lambda: server.started, "start")
    yield listening.getsockname()[1]
    server.should_exit = server.force_exit = True
    running.join(PATIENCE_S)


def _ask(port: int, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send all parts, then read the first answer; of one that closes, to its end."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        for part in parts:
            connection.sendall(part)
        return _answer(connection)


def _answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    reading = connection.makefile("rb")
    status = int(reading.readline().split()[1])
    lines = iter(reading.readline, b"\r\n")
    pairs = (line.decode().rstrip().split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in pairs}
    body = reading.read(int(headers["content-length"]))
    if headers.get("connection") == "close":
        assert reading.read() == b""
    return status, headers, body


def _refused(port: int, status: int, code: str, *parts: bytes) -> None:
    got, headers, body = _ask(port, *parts)
    error = json.loads(body)["error"]
    assert (got, error["code"]) == (status, code), body
    assert set(error) == {"message", "type", "code", "param"}
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert "server" not in headers


TOO_MUCH = {
    "one header": (GET + b"x: " + b"a" * ENOUGH + b"\r\n\r\n",),
    "a header without end": (GET + b"x: ", *[b"a" * MAX_HEAD_BYTES] * 12),
    "a name without end": (GET, *[b"a" * MAX_HEAD_BYTES] * 12),
    "many headers": (GET + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",),
    "many large headers": (GET + b"".join(b"x: %04000d\r\n" % k for k in range(20)) + b"\r\n",),
    "the URL": (b"GET /" + b"a" * ENOUGH + b" HTTP/1.1\r\nhost: x\r\n\r\n",),
    "a URL without end": (b"GET /", *[b"a" * MAX_HEAD_BYTES] * 12),
    "what follows a body": (
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        *[b"x: " + b"a" * 8000 + b"\r\n"] * 20,
    ),
    "a trailer without end": (
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ",
        *[b"a" * MAX_HEAD_BYTES] * 12,
    ),
    "a chunk's name without end": (
        POST + b"transfer-encoding: chunked\r\n\r\n1;x=",
        *[b"a" * MAX_HEAD_BYTES] * 12,
    ),
    "the second request": (
        GET + b"\r\n",
        GET + b"x: " + b"a" * ENOUGH,
    ),
}


@pytest.mark.parametrize("kind", [kind for kind in TOO_MUCH if kind != "the second request"])
def test_too_much_of_anything_but_a_body_is_refused(port: int, kind: str) -> None:
    _refused(port, 431, "headers_too_large", *TOO_MUCH[kind])


def test_a_kept_connection_has_the_same_limits(port: int) -> None:
    first, second = TOO_MUCH["the second request"]
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(first)
        assert _answer(connection)[0] == 200
        connection.sendall(second)
        assert _answer(connection)[0] == 431


def test_what_is_no_http_is_worded_too(port: int) -> None:
    _refused(port, 400, "bad_request", b"\x16\x03\x01\x02\x00\x01\x00")
    _refused(port, 400, "bad_request", POST + b"content-length: -5\r\n\r\n{}")


def test_usual_and_large_requests_pass(port: int) -> None:
    many = b"".join(b"x-%d: y\r\n" % k for k in range(MAX_HEADERS - 2))
    assert json.loads(_ask(port, GET + many + b"\r\n")[2]) == {"body": 0, "headers": 99}
    large = GET + b"x: " + b"a" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n"
    assert _ask(port, *(large[k : k + 5000] for k in range(0, len(large), 5000)))[0] == 200
    size = 3_000_000
    status, headers, body = _ask(port, POST + b"content-length: %d\r\n\r\n" % size, b"a" * size)
    assert (status, json.loads(body)["body"]) == (200, size)
    assert "server" not in headers
    tiny = b"1\r\na\r\n" * 20_000  # more frame than body
    chunked = (POST + b"transfer-encoding: chunked\r\n\r\n", tiny, b"0\r\n\r\n")
    assert json.loads(_ask(port, *chunked)[2])["body"] == 20_000


def test_headers_that_do_not_come_end_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_HEAD_S", 0.2)
    _refused(port, 408, "request_timeout", GET)
    # Not one whose head is there.
    status = _ask(port, POST + b"content-length: 1\r\n\r\n", *[b""], b"a")[0]
    assert status == 200


def test_a_hundred_megabytes_of_headers_leave_no_memory_behind(port: int) -> None:
    before = psutil.Process().memory_info().rss
    megabyte = b"a" * 1_000_000
    _refused(port, 431, "headers_too_large", GET + b"x: ", *[megabyte] * 100)
    assert psutil.Process().memory_info().rss - before < 20e6

"""A real S3 service on loopback, and a proxy in front of it that fails as networks do."""

import contextlib
import http.client
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "trajectories"

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "expect", "date", "server"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 with one bucket; gives its endpoint."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    server._server.app = _one_condition_at_a_time(server._server.app)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        yield endpoint
    finally:
        server.stop()


def _one_condition_at_a_time(application: Any) -> Any:
    """As S3 itself: moto may be interrupted between its look at an object and its write."""
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        with lock if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            return application(environ, start_response)

    return answer


def s3_environment(endpoint: str) -> dict[str, str]:
    """Variables that point every S3 client of a process at the endpoint, and at nothing else."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_ENDPOINT_URL": endpoint,
    }


# What boto3 sends on its own accord, and services that are older or not Amazon's refuse.
CHECKSUM_HEADERS = {
    start: (400, "InvalidArgument")
    for start in ("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")
}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of connections that were cut on purpose."""


class FaultyProxy:
    """Passes requests on to an S3 service, and answers some of them with a fault.

    Attributes:
        every: each request of this number fails, in turn by a 500, a 503, a connection reset
            before the request is passed on, one behind it (so that it took effect and its answer
            is lost), one in the middle of the answer, and a slow answer; 0 = none.
        refuse: an S3 error code with which all requests are answered; empty = none.
        faults: what was injected, in order.
        unknown: beginnings of headers that the service does not know, in lower case, each with the
            HTTP status and the S3 error code with which it refuses them.
        regions: those for which requests were signed.
    """

    def __init__(self, endpoint: str, every: int = 0, slow_s: float = 1.0):
        self.every, self.slow_s, self.refuse = every, slow_s, ""
        self.faults: list[str] = []
        self.unknown: dict[str, tuple[int, str]] = {}
        self.regions: set[str] = set()
        self._target = endpoint.removeprefix("http://")
        self._requests = itertools.count(1)
        self._kinds = itertools.cycle(
            ("500", "503", "reset", "lost answer", "half an answer", "slow")
        )
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_request

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self) -> str:
        with self._lock:
            if not self.every or next(self._requests) % self.every:
                return ""
            self.faults.append(next(self._kinds))
            return self.faults[-1]

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        fault = self._next_fault()
        # AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/s3/aws4_request, ...
        self.regions.update(request.headers.get("authorization", "").split("/")[2:3])
        refused = self._refused(request)
        if refused is not None:
            status, code = refused
            _answer(request, status, _ERROR.format(code=code).encode())
        elif self.refuse:
            _answer(request, 400, _ERROR.format(code=self.refuse).encode())
        elif fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            _answer(request, int(fault), _ERROR.format(code=code).encode())
        elif fault == "reset":
            _reset(request)
        else:
            if fault == "slow":
                time.sleep(self.slow_s)
            self._pass_on(request, body, fault)

    def _refused(self, request: BaseHTTPRequestHandler) -> tuple[int, str] | None:
        headers = [header.lower() for header in request.headers]
        found = (
            a for start, a in self.unknown.items() if any(h.startswith(start) for h in headers)
        )
        return next(found, None)

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(self._target, timeout=60)
        headers = {k: v for k, v in request.headers.items() if k.lower() != "expect"}
        connection.request(request.command, request.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost answer":
            _reset(request)
            return
        half = len(content) // 2 if fault == "half an answer" else len(content)
        _answer(request, answer.status, content, answer.getheaders(), send=half)
        if fault == "half an answer":
            _reset(request)


def _answer(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: Sequence[tuple[str, str]] = (),
    send: int | None = None,
) -> None:
    """Answer, with the first `send` bytes of the content; None = all."""
    request.send_response(status)
    for name, value in headers:
        if name.lower() not in _HOP_BY_HOP:
            request.send_header(name, value)
    length = dict(headers).get("Content-Length", "0") if request.command == "HEAD" else len(content)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content[:send])


def _reset(request: BaseHTTPRequestHandler) -> None:
    """Close the connection with RST in place of FIN."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # The handler's files hold the socket open, whatever is closed by name.
    os.close(request.connection.detach())
    request.close_connection = True

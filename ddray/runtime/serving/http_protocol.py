"""What an HTTP connection may cost before a request is there: bytes and time of its head.

uvicorn's parser keeps headers of any size and waits for them for ever. This is for its `Config`
under the name that Serve leaves it with, "auto", and must be put there before Serve begins to
listen.
"""

import asyncio
from typing import Any

from starlette.responses import Response
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ddray.runtime.serving.access import answer
from ddray.serving.api import RequestError

MAX_HEAD_BYTES = 32_768
MAX_HEADERS = 100
# For a head to come once it has begun.
_HEAD_S = 10.0
# What a refused client still sends is read and dropped for so long: it may read the answer only
# when it has sent all.
_LINGER_S = 5.0
_DEFAULTS = "default_headers"


def limit_connections() -> None:
    """Have servers that this process will start use `LimitedProtocol`."""
    HTTP_PROTOCOLS["auto"] = f"{LimitedProtocol.__module__}:{LimitedProtocol.__name__}"


class _TooLargeError(Exception):
    """Ends the parser's work."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, whose refusals are worded as the service words them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Bytes that came since the last of a body or the end of a request: those of a head, or of
        # what may follow a body, which the parser keeps as it keeps a head.
        self._head_bytes = self._header_bytes = self._headers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_refused = False
        # What serves is nobody's business.
        for holder, name in ((self.config, "encoded_headers"), (self.server_state, _DEFAULTS)):
            told = [(key, value) for key, value in getattr(holder, name) if key != b"server"]
            setattr(holder, name, told)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client."""
        super().connection_made(transport)
        # As between two requests.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._is_refused:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self._is_refused:
            self._refuse(_too_large())

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._header_bytes = self._headers = 0
        self._stop_timer()
        self._timer = self.loop.call_later(_HEAD_S, self._head_is_late)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header; also one that follows a body."""
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The end of a head."""
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it."""
        if self._header_bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            self._refuse(_too_large())
        else:
            self._refuse(RequestError(400, "this is no HTTP request", "bad_request"))

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            raise _TooLargeError

    def _head_is_late(self) -> None:
        message = f"the headers did not come within {_HEAD_S:g} s; send them at once"
        self._refuse(RequestError(408, message, "request_timeout"))

    def _refuse(self, error: RequestError) -> None:
        """Answer, hear the client out, and close."""
        self._is_refused = True
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whose answer can no longer be told from this one
            self.cycle.message_event.set()
        if self.transport.is_closing():
            return
        self.transport.write(_wire(answer(error, {"Connection": "close"})))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large() -> RequestError:
    message = (
        f"the request's headers are more than {MAX_HEADERS}, or more than {MAX_HEAD_BYTES} bytes "
        "with its URL; send fewer"
    )
    return RequestError(431, message, "headers_too_large")


def _wire(response: Response) -> bytes:
    lines = [name + b": " + value for name, value in response.raw_headers]
    return STATUS_LINE[response.status_code] + b"\r\n".join([*lines, b"", bytes(response.body)])

"""Requests from anybody: valid ones, nearly valid ones, and what nobody in his mind would send."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ddray.serving.api import (
    MAX_SEED,
    ModelCard,
    RequestError,
    parse_request,
)
from ddray.serving.order import check_request
from tests.chaos.service import FULL, RAW

_JSON = "application/json"
# Lone surrogates too, which UTF-8 has no bytes for.
_TEXT = st.text(st.characters(), max_size=30)
_NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**400, -(10**400), 2**31, 2**53, 2**63, 2**64]),
    st.floats(),  # with infinities and NaN, which Python writes although JSON has none
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_VALID = st.fixed_dictionaries(
    {"prompt": st.integers(0, 9) | st.integers(0, 9).map(str)},
    optional={
        "n": st.sampled_from([1, 1, 1, 2]),
        "seed": st.integers(0, MAX_SEED) | st.none(),
        "steps": st.sampled_from([1, 2, "0", "0,20", " 0 , 20 "]),
        "size": st.sampled_from(["28x28", "auto"]),
        "quality": st.sampled_from(["auto", "standard", None]),
        "stream": st.just(False),
        "model": st.just("digits-llamagen-dd"),
        "response_format": st.just("b64_json"),
        "output_format": st.sampled_from(["png", "webp", "jpeg"]),
        "user": _TEXT,
    },
)
_FIELDS = st.sampled_from(
    [
        "prompt",
        "n",
        "seed",
        "steps",
        "size",
        "model",
        "response_format",
        "output_format",
        "user",
        "quality",
        "style",
        "stream",
        "num_inference_steps",
        "guidance_scale",
        "output_compression",
        "N",
    ]
)
# Near the edges of what is allowed, and of what Python's own readers bear.
_EDGES = st.sampled_from(
    [
        0,
        -1,
        10,
        17,
        100,
        2**63,
        1.0,
        "",
        "1",
        "0,",
        "0,0",
        "20,0",
        "0,1",
        "teacher",
        "0,teacher:1-20",
    ]
    + ["28X28", "0x0", "url", "gif", "PNG", "\x00", "9" * 5000, "٣", "𝟛", "-0", "1e1", "A" * 3000]
)
_MUTATED = st.tuples(_VALID, _FIELDS, _EDGES | _ANYTHING).map(lambda t: t[0] | {t[1]: t[2]})
_BYTES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"",
            b"{",
            b"null",
            b"[" * 60_000,
            b'{"prompt":' * 9_000,
            b'{"prompt":1}{}',
            b"\xff\xfe{\x00",
        ]
        + [b'{"prompt":' + b"9" * 5000 + b"}", b'{"prompt":1,"prompt":2}', b"\xef\xbb\xbf{}"]
        + [b" " * 64_001, b'{"prompt":1e999}', b'{"prompt":NaN}', b'{"\\ud800":1}', b'"\\u0000"']
    ),
)
_TYPES = st.sampled_from(
    ["text/plain", "", "application/jsonp", "application/x-www-form-urlencoded", "\xff", ";;;"]
    + ["multipart/form-data; boundary=x", "application/json; charset=utf-16", "APPLICATION/JSON ;x"]
)
# What the proxy, the ingress or a framework might act upon, with values that they do not expect.
_NAMES = st.sampled_from(
    [
        "x-request-id",
        "serve_multiplexed_model_id",
        "serve-multiplexed-model-id",
        "x-session-id",
        "traceparent",
        "accept",
        "accept-encoding",
        "authorization",
        "origin",
        "cookie",
        "range",
        "if-none-match",
        "x-forwarded-for",
        "x-forwarded-proto",
        "forwarded",
        "via",
        "x-http-method-override",
        "content-encoding",
        "x",
    ]
)
_VALUES = st.binary(max_size=40).map(
    lambda value: bytes(byte for byte in value if byte >= 32 and byte != 127).strip()
)
_HEADERS = st.lists(st.tuples(_NAMES, _VALUES), max_size=3)
_ROUTES = st.sampled_from([FULL, RAW])
_PATHS = st.one_of(
    st.sampled_from(
        ["/v1", "/v1/", "/v1/images/raw/", "//v1/models", "/v1/models/x", "/docs", "/../etc/passwd"]
        + ["/%00", "/%ff%fe", "/v1/images/raw%0d%0aX:1", "/openapi.json", "/" + "a" * 4000, "/?n=1"]
    ),
    st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=20).map(
        lambda text: "/" + text.replace("#", "").replace("?", "").lstrip("/-")
    ),
)
_METHODS = st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        method: HTTP method.
        path: as sent.
        body: bytes of the body.
        headers: names and values.
        kind: the content type.
    """

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()
    kind: str = _JSON

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """As httpx takes them."""
        given = [(name.encode(), value) for name, value in self.headers]
        return [(b"content-type", self.kind.encode("latin-1")), *given]

    @property
    def is_json(self) -> bool:
        """Whether it says so, and that nothing has packed it."""
        packed = next((value for name, value in self.headers if name == "content-encoding"), b"")
        plain = packed.decode("latin-1").strip().lower() in ("", "identity")
        return plain and self.kind.partition(";")[0].strip().lower() == _JSON

    def verdict(self, cards: Mapping[str, ModelCard]) -> RequestError | None:
        """Of the pure checks, on a request to a route with a body; None = valid."""
        try:
            order = check_request(parse_request(self.body), cards)
        except RequestError as error:
            return error
        if self.path == RAW and order.n != 1:
            return RequestError(400, "", "invalid_value", "n")
        return None


def _dumped(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    def dump(value: Any, ascii_only: bool) -> bytes:
        return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")

    return st.builds(dump, values, st.booleans())


def _post(bodies: st.SearchStrategy[bytes], **other: Any) -> st.SearchStrategy[Case]:
    return st.builds(Case, st.just("POST"), st.just(FULL), bodies, _HEADERS.map(tuple), **other)


_CASES = st.one_of(
    _post(_dumped(_VALID)),
    *[_post(_dumped(_MUTATED))] * 5,
    *[_post(_dumped(_ANYTHING))] * 2,
    *[_post(_BYTES)] * 2,
    _post(_dumped(_VALID) | _BYTES, kind=_TYPES),
    st.builds(Case, _METHODS, _ROUTES | _PATHS, _dumped(_VALID) | _BYTES, _HEADERS.map(tuple)),
    st.builds(Case, st.just("POST"), _PATHS, _dumped(_VALID) | _BYTES, _HEADERS.map(tuple)),
)


def cases(count: int) -> list[Case]:
    """As many requests; what is posted goes to both routes."""
    made: list[Case] = []

    @settings(
        # Each is one case at least. Which they are depends on the modules that are loaded.
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_CASES)
    def collect(case: Case) -> None:
        made.append(case)
        if (case.method, case.path) == ("POST", FULL):
            made.append(replace(case, path=RAW))

    collect()
    return made[:count]


def read_cards(models: Mapping[str, Any]) -> dict[str, ModelCard]:
    """What GET /v1/models tells of the students."""
    names = [field.name for field in fields(ModelCard)]
    return {
        entry["id"]: ModelCard(
            **{
                name: tuple(entry[name]) if isinstance(entry[name], list) else entry[name]
                for name in names
            }
        )
        for entry in models["data"]
    }

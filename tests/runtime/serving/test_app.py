"""The image service over HTTP, on a real Ray Serve with tiny models of random weights."""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import jsonschema
import openai
import psutil
import pytest
import ray
import torch
from fastapi.openapi.models import OpenAPI
from PIL import Image
from ray import serve

from ddray.config.serving import ServeConfig
from ddray.errors import CheckpointError, ClusterError, ConfigError
from ddray.models.zoo import load_teacher, new_student
from ddray.runtime.serving import app
from ddray.runtime.serving.app import STUDENTS, build_app, run
from ddray.serving.image_file import image_bytes
from ddray.serving.rendering import ImageJob, Renderer
from ddray.storage.checkpoint import save_folder
from tests.loopback import free_port
from tests.patience import PATIENCE_S, wait_until
from tests.processes import suspended
from tests.runtime.tiny import write_teacher
from tests.s3_server import BUCKET, s3_environment, s3_server

pytestmark = pytest.mark.ray

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FULL, RAW = "/v1/images/generations", "/v1/images/raw"
KEY = "a-key-that-no-log-may-hold"
GETS = ("/", "/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/models/second")
PAGE = "https://page.example.org"
LIMITS = {"max_batch_size": 64, "max_images": 400, "request_timeout_s": 60.0}


def _write_student(folder: Path, teacher: str, seed: int, schedule: list[int]) -> str:
    model = load_teacher(teacher, device="cpu")
    network, card = new_student(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    card |= {"schedule": schedule, "class_names": NAMES, "teacher": teacher}
    state, tokenizer = network.state_dict(), model.tokenizer.state_dict()
    save_folder(folder, card, model=state, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders by the names that they are served under; the last one cannot be loaded."""
    runs = tmp_path_factory.mktemp("runs")
    teacher = write_teacher(runs / "teacher")
    folders = {
        "first": _write_student(runs / "first" / "student", teacher, 1, [0, 8]),
        "second": _write_student(runs / "second" / "student", teacher, 2, [0, 4, 12]),
        "broken": _write_student(runs / "broken" / "student", teacher, 3, [0, 8]),
    }
    (runs / "broken" / "student" / "model.safetensors").write_bytes(b"no weights")
    return folders


@pytest.fixture(scope="module")
def renderers(students: dict[str, str]) -> Iterator[dict[str, Renderer]]:
    """What the service should answer with, made without it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: Renderer.load(students[name], teacher=True) for name in ("first", "second")}
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(students: dict[str, str]) -> ServeConfig:
    both = (students["first"], students["second"])
    return ServeConfig(student=both, teacher=True, port=free_port(), **LIMITS)


@pytest.fixture(scope="module")
def url(ray_local: None, config: ServeConfig) -> Iterator[str]:
    try:
        yield run(config)
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        yield client


def _post(client: httpx.Client, body: Any, path: str = FULL, **other: Any) -> httpx.Response:
    headers = {"content-type": "application/json", **other.pop("headers", {})}
    return client.post(path, content=json.dumps(body), headers=headers, **other)


def _images(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


def _expect(
    answer: httpx.Response, status: int, code: str, message: str, param: str | None = None
) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert message in error["message"]


def _all_at_once(client: httpx.Client, bodies: list[Any]) -> list[httpx.Response]:
    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=client.base_url, timeout=PATIENCE_S, trust_env=False
        ) as many:
            return list(await asyncio.gather(*(many.post(FULL, json=body) for body in bodies)))

    return asyncio.run(together())


def _replicas() -> dict[int, str]:
    """Processes of the service, by their ids."""
    processes = psutil.Process().children(recursive=True)
    # A process at work has the method's name behind a dot.
    names = {p.pid: " ".join(p.cmdline()).split(".")[0].strip() for p in processes}
    return {pid: name for pid, name in names.items() if name.startswith("ray::ServeReplica:ddray:")}


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """No image is made meanwhile, however fast the machine: what is asked for waits."""
    (students,) = (pid for pid, name in _replicas().items() if name.endswith(f":{STUDENTS}"))
    with suspended(psutil.Process(students)):
        yield


def _more_than_room(client: httpx.Client, bodies: list[Any], refused: int) -> list[httpx.Response]:
    """Ask for all at once, and have images made only when so many were refused."""
    with ThreadPoolExecutor(len(bodies)) as pool, _held():
        asked = [pool.submit(client.post, FULL, json=body) for body in bodies]
        wait_until(lambda: sum(answer.done() for answer in asked) >= refused, "refusal")
    return [answer.result() for answer in asked]


# What is answered.


def test_generations_answer_as_openai_does(client: httpx.Client) -> None:
    answer = client.post(FULL, json={"prompt": "Three", "n": 2, "seed": 5, "user": "me"})
    body = answer.json()
    images = _images(answer)
    assert {key: body[key] for key in body if key not in ("created", "data")} == {
        "seed": 5,
        "seed_str": "5",
        "model": "first",
        "steps": 1,
        "size": "8x8",
        "output_format": "png",
    }
    assert isinstance(body["created"], int)
    assert [image["index"] for image in body["data"]] == [0, 1]
    assert images[0] != images[1]
    picture = Image.open(io.BytesIO(images[0]))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (8, 8))


@pytest.mark.parametrize(
    ("model", "steps", "schedule"),
    [
        ("first", 1, "0"),
        ("first", 2, "0,8"),
        ("second", 3, "0,4,12"),
        ("second", "0, 12", "0,12"),
        ("first", "teacher", "teacher"),
        ("second", "0,teacher:2-4,4,12", "0,teacher:2-4,4,12"),
    ],
)
def test_images_are_to_the_byte_those_of_the_student_and_of_its_teacher(
    client: httpx.Client,
    renderers: dict[str, Renderer],
    model: str,
    steps: int | str,
    schedule: str,
) -> None:
    asked = {"model": model, "prompt": "four", "n": 3, "seed": 9, "steps": steps}
    answer = client.post(FULL, json=asked)
    expected = renderers[model].images([ImageJob(4, k, 9) for k in range(3)], schedule)
    assert _images(answer) == [image_bytes(image) for image in expected]
    assert (answer.json()["model"], answer.json()["steps"]) == (model, steps)


def test_a_seed_gives_the_same_bytes_whatever_shares_the_batch(client: httpx.Client) -> None:
    requests = [
        {
            "model": ("first", "second")[k % 5 == 0],
            "prompt": k % 10,
            "seed": k % 3,
            "n": 1 + k % 2,
            "steps": ("0", "teacher")[k % 6 == 0],
            "output_format": ("png", "webp", "jpeg")[k % 3],
        }
        for k in range(24)
    ]
    alone = [_images(client.post(FULL, json=request)) for request in requests]
    assert len({image for images in alone for image in images}) > 20
    assert [_images(answer) for answer in _all_at_once(client, requests)] == alone


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_raw_gives_the_file_of_the_first_image(client: httpx.Client, output_format: str) -> None:
    asked = {"prompt": 7, "seed": 2**63 - 1, "output_format": output_format}
    first = _images(client.post(FULL, json={**asked, "n": 3}))[0]
    answer = client.post(RAW, json={**asked, "prompt": "7"})
    assert answer.content == first
    assert answer.headers["content-type"] == f"image/{output_format}"
    assert answer.headers["x-ddray-seed"] == str(2**63 - 1)
    assert Image.open(io.BytesIO(first)).format == output_format.upper()


def test_an_absent_seed_is_drawn_and_returned(client: httpx.Client) -> None:
    answers = [client.post(RAW, json={"prompt": 1}) for _ in range(2)]
    seeds = [int(answer.headers["x-ddray-seed"]) for answer in answers]
    assert seeds[0] != seeds[1]
    again = client.post(RAW, json={"prompt": 1, "seed": seeds[0]})
    assert again.content == answers[0].content


def test_a_seed_that_javascript_would_round_is_told_in_a_string_too(client: httpx.Client) -> None:
    seed = 2**63 - 1
    answers = [client.post(FULL, json={"prompt": 1, "seed": given}) for given in (seed, str(seed))]
    assert _images(answers[0]) == _images(answers[1])
    for answer in answers:
        assert (answer.json()["seed"], answer.json()["seed_str"]) == (seed, str(seed))
        assert answer.headers["x-ddray-seed"] == str(seed)


def test_the_compression_that_is_asked_for_is_that_of_the_file(client: httpx.Client) -> None:
    asked = {"prompt": 7, "seed": 1, "output_format": "webp"}
    sizes = [
        len(client.post(RAW, json={**asked, "output_compression": percent}).content)
        for percent in (0, 50, 100)
    ]
    assert sizes == sorted(set(sizes))


def test_the_client_of_openai_generates_an_image(client: httpx.Client, url: str) -> None:
    with httpx.Client(trust_env=False) as transport:
        service = openai.OpenAI(base_url=f"{url}/v1", api_key="x" * 20, http_client=transport)
        answer = service.images.generate(
            model="second",
            prompt="three",
            n=2,
            size="8x8",  # type: ignore[call-overload]
            response_format="b64_json",
            extra_body={"seed": 5},
        )
        assert [model.id for model in service.models.list()] == ["first", "second"]
        with pytest.raises(openai.BadRequestError, match="unknown class 'cat'"):
            service.images.generate(model="second", prompt="cat")
    asked = {"model": "second", "prompt": 3, "n": 2, "seed": 5}
    served = [base64.b64decode(image.b64_json) for image in answer.data]
    assert served == _images(client.post(FULL, json=asked))


def test_models_list_what_may_be_asked(client: httpx.Client, students: dict[str, str]) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    first, second = answer["data"]
    assert isinstance(first.pop("created"), int)
    assert first == {
        "id": "first",
        "object": "model",
        "owned_by": "ddray",
        "conditioning": "class",
        "num_classes": 10,
        "class_names": NAMES,
        "schedule": [0, 8],
        "stages": 16,
        "teacher": str(Path(students["first"]).parents[1] / "teacher"),
        "steps": [1, 2, "teacher"],
        "size": "8x8",
        "max_n": 16,
        "example_captions": [],
        "max_caption": 0,
    }
    assert (second["id"], second["steps"]) == ("second", [1, 3, "teacher"])
    assert client.get("/v1/models/second").json() == second


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("dall-e-3", "dall-e-3"),
        ("a%2Fb", "a/b"),
        ("a/b", "a/b"),
        ("100%25", "100%"),
        ("%2525", "%25"),
        ("First", "First"),
        ("", ""),
    ],
)
def test_a_model_that_is_not_there_is_not_found_by_its_name(
    client: httpx.Client, path: str, name: str
) -> None:
    told = f"model {name!r} is not served here; served is 'first' or 'second'"
    _expect(client.get(f"/v1/models/{path}"), 404, "model_not_found", told, "model")


def test_the_schema_is_valid_and_its_examples_are_what_it_says(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    OpenAPI.model_validate(schema)
    described = {FULL, RAW, "/v1/models", "/v1/models/{model}", "/healthz", "/readyz"}
    assert set(schema["paths"]) == described
    assert "9223372036854775807" in client.get("/openapi.json").text
    for path in (FULL, RAW):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator.check_schema(body)
        validator = jsonschema.Draft202012Validator(body)
        assert len(body["examples"]) == 2
        for example in body["examples"]:
            validator.validate(example)
            assert _post(client, example).status_code == 200
        assert not validator.is_valid({"prompt": 3, "n": 17})
        known = schema["paths"][path]["post"]["responses"]
        assert set(known) == {"200", *["400", "401", "404", "413", "415", "500", "503", "504"]}
    made = schema["paths"][FULL]["post"]["responses"]["200"]["content"]["application/json"]
    jsonschema.validate(client.post(FULL, json={"prompt": 3, "n": 2}).json(), made["schema"])
    files = schema["paths"][RAW]["post"]["responses"]["200"]["content"]
    assert set(files) == {"image/png", "image/webp", "image/jpeg"}
    for path in ("/v1/models", "/v1/models/{model}", "/healthz", "/readyz"):
        (kind,) = schema["paths"][path]["get"]["responses"]["200"]["content"].values()
        whole = {**kind["schema"], "components": schema["components"]}
        jsonschema.validate(client.get(path.replace("{model}", "second")).json(), whole)


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_page_needs_no_other_origin(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe-inline" not in policy
    assert policy.count("'sha256-") == 2
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_head_is_answered_as_get_without_the_content(client: httpx.Client) -> None:
    for path in GETS:
        answer, whole = client.head(path), client.get(path)
        assert answer.status_code == 200
        assert answer.content == b""
        for name in ("content-type", "content-length"):
            assert answer.headers[name] == whole.headers[name]
    missing = client.head("/v1/models/absent")
    assert (missing.status_code, missing.content) == (404, b"")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        *((path, "GET, HEAD, OPTIONS") for path in GETS),
        *((p, "POST, OPTIONS") for p in (FULL, RAW)),
    ],
)
def test_every_path_tells_its_methods(client: httpx.Client, path: str, methods: str) -> None:
    asked = client.options(path)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["allow"] == methods
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - {
        *methods.split(", ")
    }:
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
        if method != "HEAD":
            told = f"{method} '{path}' is not allowed; use {methods.split(',')[0]}"
            _expect(answer, 405, "method_not_allowed", told)
    _expect(client.options("/v2/x"), 404, "not_found", "OPTIONS '/v2/x' does not exist")


def test_every_answer_has_safe_headers_and_an_id_and_no_leave_for_other_pages(
    client: httpx.Client,
) -> None:
    for answer in (
        client.get("/", headers={"origin": PAGE}),
        client.get("/v1/models", headers={"origin": PAGE}),
        client.get("/nowhere", headers={"origin": PAGE}),
        client.post(RAW, json={"prompt": 1}, headers={"origin": PAGE}),
        client.post(RAW, json={"prompt": 10}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert len(answer.headers["x-request-id"]) >= 32
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    answer = client.get("/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


# What is refused.

BAD_FIELDS = [
    ({"prompt": 10}, 400, "unknown_class", "prompt", "valid are class ids 0 to 9"),
    ({"prompt": "fore"}, 400, "unknown_class", "prompt", "did you mean 'four'?"),
    ({"prompt": "\ud800"}, 400, "unknown_class", "prompt", r"unknown class '\ud800'"),
    ({}, 400, "missing_required_parameter", "prompt", "prompt is missing"),
    ({"prompt": 1, "n": 17}, 400, "invalid_value", "n", "from 1 to 16"),
    ({"prompt": 1, "seed": 2**63}, 400, "invalid_value", "seed", "from 0 to 9223372036854775807"),
    ({"prompt": 1, "steps": 3}, 400, "invalid_value", "steps", "trained for 1, 2, 'teacher'"),
    ({"prompt": 1, "steps": "0,teacher:4-8"}, 400, "invalid_value", "steps", "nothing makes"),
    ({"prompt": 1, "size": "256x256"}, 400, "invalid_value", "size", "first makes 8x8 images"),
    ({"prompt": 1, "model": "broken"}, 404, "model_not_found", "model", "'first' or 'second'"),
    ({"prompt": 1, "size": "512x512"}, 400, "invalid_value", "size", "first makes 8x8 images"),
    ({"prompt": 1, "style": "vivid"}, 400, "invalid_value", "style", "it must be null"),
    ({"prompt": 1, "stream": True}, 400, "invalid_value", "stream", "it must be false"),
    ({"prompt": 1, "tyle": "vivid"}, 400, "unknown_parameter", "tyle", "did you mean style?"),
    ({"prompt": 1, "response_format": "url"}, 400, "url_not_configured", "response_format", "b64"),
    ({"prompt": 1, "output_format": "gif"}, 400, "invalid_value", "output_format", '"png"'),
    ([1], 400, "invalid_value", None, "must be a JSON object"),
]


@pytest.mark.parametrize("path", [FULL, RAW])
@pytest.mark.parametrize(("body", "status", "code", "param", "message"), BAD_FIELDS)
def test_bad_fields_are_refused_in_one_shape(
    client: httpx.Client, path: str, body: Any, status: int, code: str, param: str, message: str
) -> None:
    _expect(_post(client, body, path), status, code, message, param)


def test_raw_gives_one_image_and_no_link(client: httpx.Client) -> None:
    answer = client.post(RAW, json={"prompt": 1, "n": 2})
    _expect(answer, 400, "invalid_value", "gives one image; leave n out", "n")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": 1, "prompt": 1}',
        b'\xef\xbb\xbf{"prompt": 1}',
        '{"prompt": 1}'.encode("utf-16"),
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
    ],
    ids=["twice", "marked", "utf-16", "empty", "open", "binary", "deep", "long"],
)
def test_malformed_json_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post(FULL, content=body, headers={"content-type": "application/json"})
    _expect(answer, 400, "invalid_json", "the body is not valid JSON")


def test_other_content_types_are_refused(client: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        answer = client.post(FULL, content=b'{"prompt": 1}', headers=headers)
        _expect(answer, 415, "unsupported_media_type", "send application/json")


def test_a_packed_body_is_refused_with_what_is_wrong(client: httpx.Client) -> None:
    packed = gzip.compress(b'{"prompt": 1}')
    answer = _post(client, 1, headers={"content-encoding": "GZIP"}, path=RAW)
    _expect(answer, 415, "unsupported_media_type", "content-encoding 'gzip' is not supported")
    kind = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = client.post(FULL, content=packed, headers=kind)
    _expect(answer, 415, "unsupported_media_type", "send the JSON as it is")
    kind["content-encoding"] = "identity"
    assert client.post(RAW, content=b'{"prompt": 1}', headers=kind).status_code == 200


def test_images_and_errors_are_kept_by_no_cache(client: httpx.Client) -> None:
    for answer in (
        client.post(RAW, json={"prompt": 1}),
        client.post(FULL, json={"prompt": 1}),
        client.post(FULL, json={"prompt": 10}),
        client.get("/nowhere"),
    ):
        assert answer.headers["cache-control"] == "no-store"


def test_a_large_body_is_read_and_refused_and_the_connection_goes_on(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    announced = client.post(FULL, content=b" " * 3_000_000, headers=headers)
    _expect(announced, 413, "request_too_large", "more than 64000 bytes")
    streamed = client.post(FULL, content=(b" " * 50_000 for _ in range(20)), headers=headers)
    _expect(streamed, 413, "request_too_large", "more than 64000 bytes")
    assert client.get("/healthz").status_code == 200


def test_unknown_paths_and_methods_keep_the_shape(client: httpx.Client) -> None:
    _expect(client.get("/v2/x"), 404, "not_found", "GET '/v2/x' does not exist; there are POST /v1")
    _expect(client.get(FULL), 405, "method_not_allowed", "use POST")
    _expect(client.delete("/v1/models"), 405, "method_not_allowed", "use GET")


# What happens under load, and to those who leave.


def test_more_than_can_be_queued_is_refused_at_once(client: httpx.Client) -> None:
    asked = {"prompt": 1, "n": 16, "seed": 1, "steps": 2}
    answers = _more_than_room(client, [asked] * 30, 1)
    refused = [answer for answer in answers if answer.status_code != 200]
    # At least two batches are always admitted: eight of these requests.
    assert 8 <= len(answers) - len(refused) < 30
    for answer in refused:
        _expect(answer, 503, "overloaded", "are admitted; try again")
        assert answer.headers["retry-after"] == "1"
    assert client.post(RAW, json={"prompt": 1}).status_code == 200


def _logged(request_id: str) -> list[dict[str, Any]]:
    """Lines of the access log with an id."""
    about = ray.get_runtime_context()
    logs = Path(about.get_temp_dir()) / about.get_session_name() / "logs" / "serve"
    lines = [line for log in logs.glob("*ingress*") for line in log.read_text().splitlines()]
    found = [line for line in lines if f'"request_id": "{request_id}"' in line]
    return [json.loads(line[line.index("{") :]) for line in found]


def test_each_request_leaves_a_line_of_json_in_the_log(client: httpx.Client) -> None:
    asked = {"prompt": "two", "n": 2, "seed": 8, "steps": 2, "model": "second"}
    _post(client, {**asked, "steps": "teacher"}, headers={"x-request-id": "logged-1"})
    client.get("/v1/x", headers={"x-request-id": "logged-2"})
    wait_until(lambda: _logged("logged-2"), "line of the log")
    (line,) = _logged("logged-1")
    assert isinstance(line.pop("ms"), float)
    assert line == {
        "request_id": "logged-1",
        "method": "POST",
        "path": FULL,
        "status": 200,
        "client": "127.0.0.1",
        "model": "second",
        "prompt": 2,
        "n": 2,
        "steps": "teacher",
        "seed": 8,
    }
    (line,) = _logged("logged-2")
    assert (line["status"], line["path"]) == (404, "/v1/x")


def _send(client: httpx.Client, body: str, length: int, request_id: str) -> socket.socket:
    """Begin a request by hand."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    head = (
        f"POST {FULL} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"x-request-id: {request_id}\r\ncontent-length: {length}\r\n\r\n"
    )
    connection.sendall((head + body).encode())
    return connection


def _images_made(model: str, schedule: str) -> int:
    """What the replicas count for Prometheus."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    text = httpx.get(address, trust_env=False, timeout=PATIENCE_S).text
    made = 0.0
    for line in text.splitlines():
        wanted = f'model="{model}"' in line and f'schedule="{schedule}"' in line
        if wanted and line.startswith("ray_ddray_images_total{"):
            made += float(line.split()[-1])
    return round(made)


def test_who_leaves_costs_no_run_and_is_no_fault_of_the_service(client: httpx.Client) -> None:
    for number in range(20):  # whether its read or its request ends first is chance
        with _send(client, "half a body", 100, f"left-1-{number}"):
            time.sleep(0.1)  # who leaves sooner may never have reached the front
    # The teacher takes one seed at a time, so that who comes then waits for many runs.
    asked = {"model": "second", "prompt": 1, "n": 16}
    bodies = [json.dumps({**asked, "steps": "teacher", "seed": seed}) for seed in range(20)]
    busy = [_send(client, body, len(body), "stayed") for body in bodies]
    time.sleep(0.2)
    body = json.dumps({**asked, "steps": "0,4"})
    leaving = _send(client, body, len(body), "left-2")
    time.sleep(0.1)
    with _held():
        leaving.close()
        wait_until(lambda: _logged("left-2"), "line of the log")
    for connection in busy:
        with connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
    # This one is behind it in the queue.
    _post(client, {"model": "second", "prompt": 1, "steps": "0,4"})
    wait_until(lambda: _images_made("second", "0,4") > 0, "image of the metrics")
    assert _images_made("second", "0,4") == 1
    wait_until(lambda: _logged("left-1-19"), "line of the log")
    # On a busy machine the last one may have left before it reached the front.
    names = [*(f"left-1-{number}" for number in range(20)), "left-2"]
    left = [line for name in names for line in _logged(name)]
    assert len(left) >= 20
    assert {line["status"] for line in left} == {499}


# What can be changed while it runs.


def test_new_limits_reach_the_replicas_that_run(
    client: httpx.Client, url: str, config: ServeConfig
) -> None:
    before = _replicas()
    assert len(before) == 2
    limits = {"max_batch_size": 4, "max_images": 20, "request_timeout_s": 0.001}
    changed = config.model_copy(update=limits)
    assert run(changed) == url
    body = {"prompt": 1, "n": 16, "steps": "teacher"}
    answer = client.post(FULL, json=body)
    _expect(answer, 504, "timeout", "no images within 0.001 s")
    assert answer.headers["retry-after"] == "2"
    run(changed.model_copy(update={"request_timeout_s": 30.0}))
    answers = _more_than_room(client, [body] * 3, 2)
    for answer in answers:
        if answer.status_code != 200:
            _expect(answer, 503, "overloaded", "16 images are being made and at most ")
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    run(config)
    assert len(_images(client.post(FULL, json=body))) == 16
    assert _replicas() == before


def test_a_change_that_cannot_work_leaves_what_serves(
    client: httpx.Client, url: str, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _replicas()
    with pytest.raises(ConfigError, match="no model"):
        run(config.model_copy(update={"student": ("absent",)}))
    monkeypatch.setattr(app, "_START_WAIT_S", 0.5)
    with pytest.raises(ClusterError, match="keeps the host and port of its first start"):
        run(config.model_copy(update={"port": free_port()}))
    assert client.post(RAW, json={"prompt": 1}).status_code == 200
    assert _replicas() == before


# Another service beside it: with keys, links, a path of its own, and more students than it holds.


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def s3_client(s3_endpoint: str) -> Any:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_environment(s3_endpoint).items():
            environment.setenv(name, value)
        return boto3.session.Session().client("s3")


@pytest.fixture(scope="module")
def locked(
    client: httpx.Client,
    students: dict[str, str],
    s3_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    config = ServeConfig(
        student=tuple(students.values()),
        models_per_replica=1,
        api_keys_file=str(keys),
        cors_origins=(PAGE,),
        images_uri=f"s3://{BUCKET}/images",
        url_expires_s=600,
    )
    with pytest.MonkeyPatch.context() as patch:
        # What would stand in the environment of its machine.
        original, environment = app.ingress_deployment, s3_environment(s3_endpoint)
        options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
        patch.setattr(
            app,
            "ingress_deployment",
            lambda config: original(config).options(ray_actor_options=options),
        )
        apps = [
            serve.RunTarget(build_app(config), name="locked", route_prefix="/locked"),
            serve.RunTarget(
                # This Ray has no GPU.
                build_app(
                    config.model_copy(
                        update={"num_gpus": 1, "api_keys_file": None, "request_timeout_s": 1}
                    )
                ),
                name="missing",
                route_prefix="/missing",
            ),
        ]
        serve.run_many(apps, wait_for_applications_running=False)
        wait_until(lambda: client.get("/locked/readyz").status_code == 200, "answer")
        wait_until(lambda: client.get("/missing/healthz").status_code == 200, "answer")
        headers = {"authorization": f"Bearer {KEY}"}
        base = client.base_url.join("/locked/")
        with httpx.Client(
            base_url=base, headers=headers, timeout=PATIENCE_S, trust_env=False
        ) as opened:
            yield opened


def test_only_a_key_opens_the_api(client: httpx.Client, locked: httpx.Client) -> None:
    for path, body in ((FULL, {"prompt": 1}), (RAW, {"prompt": 1}), (FULL, {})):
        answer = client.post(f"/locked{path}", json=body)
        _expect(answer, 401, "invalid_api_key", "the API key is missing; send it as 'Authoriz")
        assert answer.headers["www-authenticate"] == "Bearer"
        wrong = client.post(
            f"/locked{path}", json=body, headers={"authorization": f"Bearer {KEY}x"}
        )
        _expect(wrong, 401, "invalid_api_key", "the API key is not known here")
        assert KEY not in wrong.text
    assert client.get("/locked/v1/models").status_code == 401
    assert client.get("/locked/v1/models/first").status_code == 401
    assert locked.get("/v1/models/first").json()["id"] == "first"
    assert client.get("/locked/v1/nothing").status_code == 401
    assert [model["id"] for model in locked.get("/v1/models").json()["data"]] == [
        "first",
        "second",
        "broken",
    ]
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert client.get(f"/locked{path}").status_code == 200


def test_students_beyond_those_in_memory_are_loaded_on_demand(
    locked: httpx.Client, renderers: dict[str, Renderer]
) -> None:
    for name in ("second", "first", "second"):
        body = {"prompt": 2, "seed": 4, "model": name, "steps": 1}
        (image,) = renderers[name].images([ImageJob(2, 0, 4)], "0")
        assert _post(locked, body, RAW).content == image_bytes(image)


def test_a_student_that_cannot_be_loaded_takes_no_other_with_it(locked: httpx.Client) -> None:
    failed = _post(locked, {"prompt": 1, "model": "broken"})
    _expect(failed, 500, "internal_error", "the service failed; its log says why")
    assert len(_images(_post(locked, {"prompt": 1, "model": "first"}))) == 1


def test_a_teacher_that_is_not_there_is_named(locked: httpx.Client) -> None:
    answer = _post(locked, {"prompt": 1, "steps": "teacher"})
    _expect(answer, 400, "teacher_not_deployed", "needs the teacher", "steps")


def test_links_give_the_images(locked: httpx.Client) -> None:
    asked = {"prompt": 3, "n": 2, "seed": 1, "output_format": "webp"}
    files = _images(_post(locked, asked))
    answer = _post(locked, {**asked, "response_format": "url"})
    assert answer.status_code == 200, answer.text
    assert [image["index"] for image in answer.json()["data"]] == [0, 1]
    for image, file in zip(answer.json()["data"], files, strict=True):
        fetched = httpx.get(image["url"], trust_env=False)
        assert fetched.content == file
        assert fetched.headers["content-type"] == "image/webp"
        assert "X-Amz-Expires=600" in image["url"]
    answer = _post(locked, {"prompt": 1, "response_format": "url"}, RAW)
    _expect(answer, 400, "invalid_value", "gives the bytes", "response_format")


def test_images_that_cannot_be_stored_are_no_fault_of_the_request(
    locked: httpx.Client, s3_client: Any
) -> None:
    asked = {"prompt": 3, "seed": 1, "response_format": "url"}
    assert _post(locked, asked).status_code == 200
    for entry in s3_client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        s3_client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    s3_client.delete_bucket(Bucket=BUCKET)
    answer = _post(locked, asked)
    _expect(answer, 503, "storage_unavailable", "cannot be stored for now; ask for b64_json")
    assert answer.headers["retry-after"] == "5"
    assert len(_images(_post(locked, {"prompt": 3, "seed": 1}))) == 1


def test_only_pages_that_are_named_may_call(locked: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST"}
    sent = "authorization,content-type,x-stainless-os,x-stainless-any,openai-organization"
    asked["access-control-request-headers"] = sent
    asked["access-control-request-private-network"] = "true"
    # A browser asks without the key.
    leave = locked.options(FULL, headers={"origin": PAGE, "authorization": "", **asked})
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == PAGE
    assert set(sent.split(",")) <= set(leave.headers["access-control-allow-headers"].split(","))
    other = "https://other.example.org"
    put = {**asked, "access-control-request-method": "PUT"}
    for given, message in (
        ({"origin": other, **asked}, f"origin {other!r} is not allowed; --cors-origins names"),
        ({"origin": other, **put}, f"origin {other!r} is not allowed"),
        ({"origin": PAGE, **put}, "method 'PUT' is not allowed; use GET or POST"),
    ):
        refused = locked.options(FULL, headers=given)
        _expect(refused, 400, "cors_refused", message)
        assert refused.headers.get("access-control-allow-origin") in (None, given["origin"])
        assert ("access-control-allow-origin" in refused.headers) == (given["origin"] == PAGE)
    answer = locked.get("/v1/models", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == PAGE
    refused = locked.get("/v1/models", headers={"origin": PAGE, "authorization": "Bearer x"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


def test_the_schema_says_under_which_path_it_holds(
    client: httpx.Client, locked: httpx.Client
) -> None:
    closed, opened = locked.get("/openapi.json").json(), client.get("/openapi.json").json()
    assert closed["servers"] == [{"url": "/locked"}]
    assert closed["paths"][RAW]["post"]["security"] == [{"key": []}]
    assert "servers" not in opened
    assert "security" not in opened["paths"][RAW]["post"]


def test_a_service_without_a_replica_says_so(client: httpx.Client, locked: httpx.Client) -> None:
    assert client.get("/missing/healthz").status_code == 200
    answer = client.get("/missing/readyz")
    _expect(answer, 503, "not_ready", "no student is ready yet")
    assert answer.headers["retry-after"] == "2"


def test_no_log_holds_a_key(locked: httpx.Client) -> None:
    about = ray.get_runtime_context()
    logs = Path(about.get_temp_dir()) / about.get_session_name() / "logs"
    texts = [file.read_bytes() for file in logs.rglob("*") if file.is_file()]
    assert len(texts) > 5
    assert not [text for text in texts if KEY.encode() in text]


# From here on the services of this module are down.


def test_a_serve_config_file_is_checked_as_the_command_is(students: dict[str, str]) -> None:
    arguments = {"student": students["first"], "replicas": "1:2", "max_batch_size": 16}
    assert isinstance(app.build(arguments), serve.Application)
    with pytest.raises(ConfigError, match=r"batch_size.*max_batch_size"):
        app.build({"batch_size": 16})


def test_a_taken_port_is_named(ray_local: None, config: ServeConfig) -> None:
    serve.shutdown()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"cannot listen on 127.0.0.1:{port}: .*--port"):
            run(config.model_copy(update={"port": port}))


@pytest.mark.parametrize("host", ["300.1.1.1", "203.0.113.7", "a" * 70])
def test_an_address_that_is_not_here_is_no_matter_of_the_port(host: str) -> None:
    with pytest.raises(ClusterError, match=rf"cannot listen on {host}:8000: .*; --host takes an"):
        app._check_port(host, 8000)


def test_what_cannot_be_served_is_refused_before_serve_starts(
    ray_local: None, config: ServeConfig, students: dict[str, str], tmp_path: Path
) -> None:
    serve.shutdown()

    def refused(**changes: Any) -> str:
        with pytest.raises((ConfigError, ClusterError, CheckpointError)) as refusal:
            run(config.model_copy(update=changes))
        return str(refusal.value)

    assert "no model" in refused(student=(str(tmp_path),))
    (tmp_path / "config.json").write_text('{"family": "llamagen"}')
    assert "family 'llamagen', which is no student" in refused(student=(str(tmp_path),))
    twice = (students["first"], students["first"])
    assert "two of the students are called 'first'" in refused(student=twice)
    assert "is a set of sizes without weights" in refused(student=("var-dd-d16",))
    assert "api_keys_file=" in refused(api_keys_file=str(tmp_path / "no-keys"))
    assert "asks for 1000 workers of 1 CPUs" in refused(replicas=(1000, 1000))
    card = json.loads((Path(students["first"]) / "config.json").read_text())
    for teacher, message in ((str(tmp_path / "gone"), "no model"), ("", "names no teacher")):
        (tmp_path / "config.json").write_text(json.dumps({**card, "teacher": teacher}))
        assert message in refused(student=(str(tmp_path),))
    assert not serve.status().proxies

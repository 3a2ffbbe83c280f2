"""The image service over HTTP, on a real Ray Serve with a tiny student of random weights."""

import asyncio
import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve

import ddray
from ddray.checkpoint import save_folder
from ddray.errors import ClusterError, ConfigError
from ddray.generate import Student
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.runtime.serving import build_app, generate_images, run
from ddray.serving_api import ImageJob, png_bytes

pytestmark = pytest.mark.ray

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES: dict[str, Any] = dict(
    dim=32, n_layer=1, n_head=4, vocab_size=32, num_classes=10, block_size=49, multiple_of=32
)
TOKENIZER: dict[str, Any] = dict(
    codebook_size=32, z_channels=32, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, in_channels=1
)
FULL, RAW = "/v1/images/generations", "/v1/images/raw"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = LlamaGenStudent(LlamaGenStudentConfig(**SIZES))
    network.init_weights()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = LlamaGenVQ(LlamaGenVQConfig(**TOKENIZER))
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(20)  # contrast: every grey level occurs
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "student"
    card = {"schedule": [0, 16], "class_names": NAMES}
    config = {"family": "llamagen-dd", **SIZES, "tokenizer": TOKENIZER, **card}
    save_folder(folder, config, model=network.state_dict(), tokenizer=tokenizer.state_dict())
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config(folder: Path, **other: Any) -> Any:
    values = dict(host="127.0.0.1", threads=1, replicas=1, batch_wait_s=0.005, max_batch_size=8)
    return SimpleNamespace(student=str(folder), **(values | {"request_timeout_s": 30.0} | other))


@pytest.fixture(scope="module")
def url(ray_local: None, folder: Path) -> Iterator[str]:
    try:
        yield run(_config(folder, port=_free_port()))
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def student(folder: Path) -> Iterator[Student]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at this size
    yield ddray.load_student(folder, device="cpu")
    torch.set_num_threads(threads)


def _images(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


def test_generations_answer_as_openai_does(client: httpx.Client) -> None:
    answer = client.post(FULL, json={"prompt": "Three", "n": 2, "seed": 5, "user": "me"})
    body = answer.json()
    images = _images(answer)
    assert {key: body[key] for key in body if key not in ("created", "data")} == {
        "seed": 5,
        "model": "tiny",
        "steps": 1,
        "size": "28x28",
        "output_format": "png",
    }
    assert isinstance(body["created"], int)
    assert [image["index"] for image in body["data"]] == [0, 1]
    assert images[0] != images[1]
    picture = Image.open(io.BytesIO(images[0]))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (28, 28))


def test_images_are_those_of_the_student(client: httpx.Client, student: Student) -> None:
    for steps, schedule in ((1, (0,)), (2, student.config["schedule"])):
        served = _images(client.post(FULL, json={"prompt": 3, "n": 2, "seed": 9, "steps": steps}))
        expected = student.decode(student.generate([3, 3], seed=9, schedule=schedule))
        for png, image in zip(served, expected.numpy(), strict=True):
            levels = np.asarray(Image.open(io.BytesIO(png)), dtype=float)
            # One level: this reference ran as a batch of two.
            assert np.abs(levels - image[0] * 255).max() <= 1.5


def test_raw_gives_the_bytes_of_the_first_image(client: httpx.Client) -> None:
    first = _images(client.post(FULL, json={"prompt": 7, "n": 3, "seed": 2**63 - 1}))[0]
    answer = client.post(RAW, json={"prompt": "7", "seed": 2**63 - 1})
    assert answer.content == first
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-ddray-seed"] == str(2**63 - 1)


def test_an_absent_seed_is_drawn_and_returned(client: httpx.Client) -> None:
    answers = [client.post(RAW, json={"prompt": 1}) for _ in range(2)]
    seeds = [int(answer.headers["x-ddray-seed"]) for answer in answers]
    assert seeds[0] != seeds[1]
    again = client.post(RAW, json={"prompt": 1, "seed": seeds[0]})
    assert again.content == answers[0].content


def test_a_seed_gives_the_same_bytes_whatever_shares_the_batch(client: httpx.Client) -> None:
    requests = [
        {"prompt": k % 10, "seed": k % 3, "n": 1 + k % 2, "steps": 1 + k % 2} for k in range(24)
    ]
    alone = [_images(client.post(FULL, json=request)) for request in requests]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as many:
            posts = (many.post(FULL, json=request, timeout=30) for request in requests)
            return list(await asyncio.gather(*posts))

    assert [_images(answer) for answer in asyncio.run(together())] == alone


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_an_image_does_not_depend_on_its_company(student: Student, chunk_size: int) -> None:
    jobs = [ImageJob(k % 10, k % 4, k // 5, ((0,), (0, 16))[k % 3 == 0]) for k in range(16)]
    alone = [png_bytes(generate_images(student, [job], chunk_size)[0]) for job in jobs]
    for count in (1, 2, 3, 4, 5, 8, 11, 15, 16):
        together = generate_images(student, jobs[-count:], chunk_size)
        assert [png_bytes(image) for image in together] == alone[-count:]


def test_models_list_what_may_be_asked(client: httpx.Client) -> None:
    answer = client.get("/v1/models").json()
    (model,) = answer["data"]
    assert answer["object"] == "list"
    assert isinstance(model.pop("created"), int)
    assert model == {
        "id": "tiny",
        "object": "model",
        "owned_by": "ddray",
        "num_classes": 10,
        "class_names": NAMES,
        "schedule": [0, 16],
        "steps": [1, 2],
        "size": "28x28",
        "max_n": 16,
    }


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_page_needs_no_other_origin(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe-inline" not in policy
    assert policy.count("'sha256-") == 2
    assert "http://" not in answer.text
    assert "https://" not in answer.text


BAD_FIELDS = [
    (
        {"prompt": 10},
        400,
        "unknown_class",
        "prompt",
        "unknown class 10; valid are class ids 0 to 9",
    ),
    ({"prompt": -1}, 400, "unknown_class", "prompt", "unknown class -1"),
    ({"prompt": "fore"}, 400, "unknown_class", "prompt", "did you mean 'four'?"),
    ({"prompt": "\ud800"}, 400, "unknown_class", "prompt", r"unknown class '\ud800'"),
    ({}, 400, "missing_required_parameter", "prompt", "prompt is missing"),
    ({"prompt": True}, 400, "invalid_value", "prompt", "a class id (an integer) or a class name"),
    ({"prompt": 1, "n": 0}, 400, "invalid_value", "n", "n=0 is not allowed: it must be an integer"),
    ({"prompt": 1, "n": 17}, 400, "invalid_value", "n", "from 1 to 16"),
    ({"prompt": 1, "n": "2"}, 400, "invalid_value", "n", "n='2' is not allowed"),
    ({"prompt": 1, "seed": -1}, 400, "invalid_value", "seed", "seed=-1 is not allowed"),
    ({"prompt": 1, "seed": 2**63}, 400, "invalid_value", "seed", "from 0 to 9223372036854775807"),
    ({"prompt": 1, "steps": 3}, 400, "invalid_value", "steps", "trained for 1 or 2"),
    ({"prompt": 1, "size": "256x256"}, 400, "invalid_value", "size", "tiny makes 28x28 images"),
    ({"prompt": 1, "model": "dall-e-3"}, 404, "model_not_found", "model", "served is 'tiny'"),
    ({"prompt": 1, "style": "vivid"}, 400, "unknown_parameter", "style", "known are model, prompt"),
    ({"prompt": 1, "response_format": "url"}, 400, "url_not_configured", "response_format", "b64"),
    ({"prompt": 1, "output_format": "webp"}, 400, "invalid_value", "output_format", '"png"'),
    ([1], 400, "invalid_value", None, "must be a JSON object"),
]


@pytest.mark.parametrize("path", [FULL, RAW])
@pytest.mark.parametrize(("body", "status", "code", "param", "message"), BAD_FIELDS)
def test_bad_fields_are_refused_in_one_shape(
    client: httpx.Client, path: str, body: Any, status: int, code: str, param: str, message: str
) -> None:
    answer = client.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    _expect(answer, status, code, message, param)


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


def test_raw_gives_one_image_only(client: httpx.Client) -> None:
    answer = client.post(RAW, json={"prompt": 1, "n": 2})
    _expect(answer, 400, "invalid_value", "gives one image; leave n out", "n")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"prompt": ' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "binary", "deep", "long"],
)
def test_malformed_json_is_refused(client: httpx.Client, body: bytes) -> None:
    answer = client.post(FULL, content=body, headers={"content-type": "application/json"})
    _expect(answer, 400, "invalid_json", "the body is not valid JSON")


def test_other_content_types_are_refused(client: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        answer = client.post(FULL, content=b'{"prompt": 1}', headers=headers)
        _expect(answer, 415, "unsupported_media_type", "send application/json")


def test_a_large_body_is_read_and_refused_and_the_connection_goes_on(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    announced = client.post(FULL, content=b" " * 3_000_000, headers=headers)
    _expect(announced, 413, "request_too_large", "more than 64000 bytes")
    streamed = client.post(FULL, content=(b" " * 50_000 for _ in range(20)), headers=headers)
    _expect(streamed, 413, "request_too_large", "more than 64000 bytes")
    assert client.get("/healthz").status_code == 200


def test_unknown_paths_and_methods_keep_the_shape(client: httpx.Client) -> None:
    _expect(client.get("/v2/x"), 404, "not_found", "GET '/v2/x' does not exist; there are POST /v1")
    answer = client.get(FULL)
    _expect(answer, 405, "method_not_allowed", "use POST")
    assert answer.headers["allow"] == "POST"
    _expect(client.delete("/v1/models"), 405, "method_not_allowed", "use GET")


def test_more_than_can_be_queued_is_refused_at_once(client: httpx.Client) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as many:
            body = {"prompt": 1, "n": 16, "seed": 1}
            posts = (many.post(FULL, json=body, timeout=30) for _ in range(12))
            return list(await asyncio.gather(*posts))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code != 200]
    # 64 images are admitted at a time: four of these requests.
    assert 4 <= len(answers) - len(refused) < 12
    for answer in refused:
        _expect(answer, 503, "overloaded", "at most 64 are admitted")
        assert answer.headers["retry-after"] == "1"
    assert client.post(RAW, json={"prompt": 1}).status_code == 200


def test_slow_and_missing_students_are_told_apart(client: httpx.Client, folder: Path) -> None:
    slow = build_app(str(folder), request_timeout_s=0.02)
    missing = build_app(str(folder), num_gpus=1, request_timeout_s=1)  # this Ray has no GPU
    targets = [
        serve.RunTarget(slow, name="slow", route_prefix="/slow"),
        serve.RunTarget(missing, name="missing", route_prefix="/missing"),
    ]
    serve.run_many(targets, wait_for_applications_running=False)
    deadline = time.monotonic() + 30
    while client.get("/slow/v1/models").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.2)

    answer = client.post(f"/slow{FULL}", json={"prompt": 1, "n": 16, "steps": 2})
    _expect(answer, 504, "timeout", "no images within 0.02 s")
    assert answer.headers["retry-after"] == "5"
    for answer in (
        client.get("/missing/readyz"),
        client.post(f"/missing{RAW}", json={"prompt": 1}),
    ):
        _expect(answer, 503, "not_ready", "no student is ready yet")
        assert answer.headers["retry-after"] == "2"
    assert client.get("/missing/healthz").status_code == 200


# From here on the service of this module is down.


def test_a_taken_port_is_named(ray_local: None, folder: Path) -> None:
    serve.shutdown()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"cannot listen on 127.0.0.1:{port}: .*--port"):
            run(_config(folder, port=port))


def test_what_cannot_be_served_is_refused_before_serve_starts(
    ray_local: None, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no model"):
        run(_config(tmp_path, port=_free_port()))
    (tmp_path / "config.json").write_text('{"family": "llamagen"}')
    with pytest.raises(ConfigError, match="family 'llamagen', which is no student"):
        run(_config(tmp_path, port=_free_port()))
    with pytest.raises(ClusterError, match="asks for 1000 workers of 1 CPUs"):
        run(_config(folder, port=_free_port(), replicas=1000))

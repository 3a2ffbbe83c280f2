"""What the image service refuses, what it makes of a request, and the bytes of its images."""

import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddray.errors import ConfigError
from ddray.serving_api import (
    ImageJob,
    ImageRequest,
    ModelCard,
    RequestError,
    check_request,
    find_class,
    parse_request,
    png_bytes,
)

CARD = ModelCard(
    id="digits",
    created=0,
    num_classes=3,
    class_names=("zero", "One", "2"),
    schedule=(0, 16),
    size="28x28",
)


def _refusal(body: object, card: ModelCard = CARD) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        check_request(parse_request(raw), card)
    return caught.value


def test_defaults() -> None:
    request = parse_request(b'{"prompt": 3, "seed": null, "n": null, "user": "me"}')
    assert request == ImageRequest(prompt=3, user="me")
    assert (request.n, request.steps, request.seed) == (1, 1, None)
    assert (request.response_format, request.output_format) == ("b64_json", "png")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing: it must be a class id"),
        ({"prompt": 1.5}, "prompt", "prompt=1.5 is not allowed"),
        ({"prompt": True}, "prompt", "prompt=True is not allowed"),
        ({"prompt": [1]}, "prompt", "prompt=[1] is not allowed"),
        ({"prompt": 1, "n": 0}, "n", "n=0 is not allowed: it must be an integer from 1 to 16"),
        ({"prompt": 1, "n": True}, "n", "n=True"),
        ({"prompt": 1, "n": 2.0}, "n", "n=2.0"),
        ({"prompt": 1, "seed": -1}, "seed", "seed=-1"),
        ({"prompt": 1, "seed": 10**4000}, "seed", "..."),
        ({"prompt": 1, "steps": 0}, "steps", "steps=0 is not allowed: it must be a positive"),
        (
            {"prompt": 1, "steps": 3},
            "steps",
            "steps=3 is not allowed: digits was trained for 1 or 2",
        ),
        (
            {"prompt": 1, "size": 28},
            "size",
            'size=28 is not allowed: it must be a string such as "2',
        ),
        ({"prompt": 1, "size": "28x29"}, "size", "size='28x29' is not allowed: digits makes 28x28"),
        ({"prompt": 1, "output_format": "webp"}, "output_format", 'must be "png"'),
        ({"prompt": 1, "response_format": "x"}, "response_format", 'must be "b64_json"'),
        ({"prompt": 1, "response_format": "url"}, "response_format", "not configured"),
        ({"prompt": 1, "quality": "hd"}, "quality", "unknown parameter 'quality'; known are model"),
        ({"prompt": 1, "sed": 4}, "sed", "did you mean seed?"),
        ({"prompt": 1, "x" * 500: 1}, "x" * 80 + "...", "known are model"),
        ({"prompt": "x" * 500}, "prompt", "unknown class 'xxx"),
        ({"prompt": "9" * 500}, "prompt", "unknown class '999"),
    ],
)
def test_refusals_name_the_field_the_value_and_what_is_allowed(
    body: dict[str, Any], param: str, message: str
) -> None:
    error = _refusal(body)
    assert (error.status, error.param) == (400, param)
    assert message in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b"[" * 60_000, "invalid_json"),
        (b"3", "invalid_value"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'{"prompt": NaN}', "invalid_value"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, code: str) -> None:
    assert (_refusal(body).status, _refusal(body).code) == (400, code)


def test_another_model_is_not_found() -> None:
    error = _refusal({"prompt": 1, "model": "dall-e-3"})
    assert (error.status, error.code) == (404, "model_not_found")
    assert error.message == "model 'dall-e-3' is not served here; served is 'digits'"
    assert check_request(ImageRequest(prompt=1, model="digits"), CARD).class_id == 1


@pytest.mark.parametrize(
    ("prompt", "class_id"), [(0, 0), ("one", 1), (" ZERO ", 0), ("1", 1), ("2", 2)]
)
def test_classes_by_id_and_by_name(prompt: int | str, class_id: int) -> None:
    assert find_class(prompt, 3, CARD.class_names) == class_id


def test_a_name_of_digits_goes_before_an_id() -> None:
    assert find_class("1", 2, ("1", "0")) == 0


@pytest.mark.parametrize(
    ("prompt", "names", "message"),
    [
        (3, (), "unknown class 3; valid are class ids 0 to 2"),
        (3, CARD.class_names, "unknown class 3; valid are class ids 0 to 2, or names zero, One, 2"),
        ("zerro", CARD.class_names, "did you mean 'zero'? Valid are class ids 0 to 2, or names z"),
        ("", (), "unknown class ''; valid are class ids 0 to 2"),
        ("\u0663", (), "valid are class ids 0 to 2"),
        ("cat", tuple(f"n{k}" for k in range(30)), "n19, ... (GET /v1/models lists all)"),
    ],
)
def test_unknown_classes_list_the_valid(
    prompt: int | str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        find_class(prompt, 3, names)
    assert message in caught.value.message
    assert (caught.value.code, caught.value.param) == ("unknown_class", "prompt")


def test_steps_are_places_in_the_trained_schedule() -> None:
    assert CARD.steps == (1, 2)
    assert check_request(ImageRequest(prompt=0, steps=1), CARD).schedule == (0,)
    assert check_request(ImageRequest(prompt=0, steps=2), CARD).schedule == (0, 16)
    assert ModelCard("m", 0, 3, (), (0, 4, 8), "8x8").steps == (1, 3)
    assert ModelCard("m", 0, 3, (), (0,), "8x8").steps == (1,)


def test_images_of_a_request_are_the_first_indices_of_its_seed() -> None:
    order = check_request(ImageRequest(prompt="one", n=3, seed=7, steps=2), CARD)
    assert order.jobs() == [ImageJob(1, k, 7, (0, 16)) for k in range(3)]


def test_an_absent_seed_is_drawn_anew_and_fits_every_reader_of_json() -> None:
    seeds = {check_request(ImageRequest(prompt=0), CARD).seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert check_request(ImageRequest(prompt=0, seed=0), CARD).seed == 0


def test_errors_have_the_shape_of_openai() -> None:
    error = RequestError(503, "busy \ud800", "overloaded", retry_after_s=1)
    assert json.loads(error.body()) == {
        "error": {
            "message": "busy \ud800",
            "type": "server_error",
            "code": "overloaded",
            "param": None,
        }
    }
    assert error.headers == {"Retry-After": "1"}
    assert RequestError(400, "", "x").headers == {}
    assert json.loads(RequestError(400, "", "x").body())["error"]["type"] == "invalid_request_error"


def test_models_entry_is_plain_json() -> None:
    entry = json.loads(json.dumps(CARD.entry()))
    assert entry["id"] == "digits"
    assert entry["steps"] == [1, 2]
    assert entry["class_names"] == ["zero", "One", "2"]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_rounded_pixels(channels: int) -> None:
    levels = np.arange(channels * 6, dtype=np.uint8).reshape(2, 3, channels) * 20
    image = levels.transpose(2, 0, 1) / np.float32(255)
    picture = Image.open(io.BytesIO(png_bytes(image)))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert np.array_equal(np.asarray(picture).reshape(2, 3, channels), levels)
    assert png_bytes(image) == png_bytes(image.copy())


def test_png_of_a_broken_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        png_bytes(np.full((1, 2, 2), np.nan, np.float32))


def test_the_pure_part_loads_neither_ray_nor_torch() -> None:
    code = "import sys, ddray.serving_api; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

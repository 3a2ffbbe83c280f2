"""What the image service refuses before it looks at its students, and its errors."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddray.serving.api import ImageRequest, RequestError, parse_request
from tests.core.serving.cards import CARDS, TAUGHT, order, refusal

# Of these, only those without an order of bytes in their names write a byte order mark.
OTHER_CODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def test_defaults() -> None:
    request = parse_request(b'{"prompt": 3, "seed": null, "n": null, "user": "me"}')
    assert request == ImageRequest(prompt=3, user="me")
    assert (request.model, request.n, request.steps, request.seed) == (None, 1, 1, None)
    assert (request.response_format, request.output_format) == ("b64_json", "png")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing: it must be a class id"),
        ({"prompt": 1.5}, "prompt", "prompt=1.5 is not allowed"),
        ({"prompt": True}, "prompt", "prompt=True is not allowed"),
        ({"prompt": [1]}, "prompt", "prompt=[1] is not allowed"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": 1, "n": 0}, "n", "n=0 is not allowed: it must be an integer from 1 to 16"),
        ({"prompt": 1, "n": 17}, "n", "n=17 is not allowed"),
        ({"prompt": 1, "n": True}, "n", "n=True"),
        ({"prompt": 1, "n": 2.5}, "n", "n=2.5"),
        ({"prompt": 1, "n": 1e30}, "n", "n=1e+30"),
        ({"prompt": 1, "n": "2.0"}, "n", "n='2.0'"),
        ({"prompt": 1, "n": "two"}, "n", "n='two'"),
        ({"prompt": 1, "n": "17"}, "n", "n=17 is not"),
        ({"prompt": 1, "n": " 2"}, "n", "n=' 2'"),
        ({"prompt": 1, "n": ""}, "n", "n=''"),
        ({"prompt": 1, "seed": -1}, "seed", "seed=-1"),
        ({"prompt": 1, "seed": 2**63}, "seed", "from 0 to 9223372036854775807"),
        ({"prompt": 1, "seed": 10**4000}, "seed", "..."),
        ({"prompt": 1, "steps": 0}, "steps", "steps=0 is not allowed: it must be a positive"),
        ({"prompt": 1, "steps": -1}, "steps", "steps=-1 is not allowed: it must be a positive"),
        ({"prompt": 1, "steps": 1.5}, "steps", "steps=1.5 is not allowed: it must be a positive"),
        ({"prompt": 1, "steps": "0," * 150}, "steps", "a schedule; GET /v1/models lists"),
        (
            {"prompt": 1, "size": 28},
            "size",
            'size=28 is not allowed: it must be a string such as "2',
        ),
        ({"prompt": 1, "size": "28x29"}, "size", "size='28x29' is not allowed: digits makes 28x28"),
        (
            {"prompt": "a", "model": "texts", "size": "28x28"},
            "size",
            "texts makes 256x256 images",
        ),
        ({"prompt": 1, "output_format": "gif"}, "output_format", 'be "png", "webp" or "jpeg"'),
        ({"prompt": 1, "output_format": "PNG"}, "output_format", "output_format='PNG'"),
        (
            {"prompt": 1, "response_format": "x"},
            "response_format",
            'must be "b64_json" or "url"',
        ),
        (
            {"prompt": 1, "response_format": "url"},
            "response_format",
            'response_format="url" is not configured here',
        ),
        ({"prompt": 1, "model": 3}, "model", "GET /v1/models lists the names"),
        ({"prompt": 1, "user": 3}, "user", "user=3 is not allowed: it must be a string"),
        ({"prompt": 1, "seed": "9223372036854775808"}, "seed", "from 0 to 9223372036854775807"),
        ({"prompt": 1, "seed": "-1"}, "seed", "seed='-1'"),
        ({"prompt": 1, "seed": "9" * 5000}, "seed", "an integer from 0"),
        ({"prompt": 1, "steps": "3"}, "steps", "steps=3 is not allowed: digits was trained for 1"),
        ({"prompt": 1, "num_inference_steps": 0}, "num_inference_steps", "a positive integer"),
        ({"prompt": 1, "size": "512x512"}, "size", "size='512x512' is not allowed: digits makes"),
        ({"prompt": 1, "quality": "hd"}, "quality", 'must be "auto" or "standard": steps decide'),
        ({"prompt": 1, "quality": "high"}, "quality", "quality='high' is not allowed"),
        ({"prompt": 1, "style": "vivid"}, "style", "style='vivid' is not allowed: it must be null"),
        ({"prompt": 1, "style": "natural"}, "style", "a student has one style"),
        ({"prompt": 1, "background": "transparent"}, "background", 'be "auto" or "opaque"'),
        ({"prompt": 1, "moderation": "high"}, "moderation", 'must be "auto" or "low"'),
        ({"prompt": 1, "stream": True}, "stream", "stream=True is not allowed: it must be false"),
        ({"prompt": 1, "stream": 0}, "stream", "stream=0 is not allowed"),
        ({"prompt": 1, "partial_images": 1}, "partial_images", "it must be 0"),
        ({"prompt": 1, "partial_images": False}, "partial_images", "it must be 0"),
        ({"prompt": 1, "guidance_scale": 7.5}, "guidance_scale", "0 or 1, which are off"),
        ({"prompt": 1, "guidance_scale": 2}, "guidance_scale", "guidance_scale=2 is not allowed"),
        ({"prompt": 1, "guidance_scale": True}, "guidance_scale", "guidance_scale=True"),
        ({"prompt": 1, "output_compression": 101}, "output_compression", "from 0 to 100"),
        ({"prompt": 1, "output_compression": 50}, "output_compression", "a png is exact"),
        ({"prompt": 1, "sed": 4}, "sed", "did you mean seed?"),
        ({"prompt": 1, "": 4}, "", "unknown parameter ''"),
        ({"prompt": 1, "x" * 500: 1}, "x" * 80 + "...", "known are model"),
        ({"prompt": "x" * 500}, "prompt", "unknown class 'xxx"),
        ({"prompt": "9" * 500}, "prompt", "unknown class '999"),
    ],
)
def test_refusals_name_the_field_the_value_and_what_is_allowed(
    body: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(body)
    assert (error.status, error.param) == (400, param)
    assert message in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b'{"prompt": "\xe9"}', "invalid_json"),
        (b"[" * 60_000, "invalid_json"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"3", "invalid_value"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'{"prompt": NaN}', "invalid_value"),
        (b'{"prompt": 1, "steps": Infinity}', "invalid_value"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, code: str) -> None:
    assert (refusal(body).status, refusal(body).code) == (400, code)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *(('{"prompt": 1}'.encode(name), "UTF-16 or UTF-32; send UTF-8") for name in OTHER_CODINGS),
        (b'\xef\xbb\xbf{"prompt": 1}', "begins with a byte order mark; send UTF-8 without"),
        (b'{"prompt": 1, "prompt": 2}', "the key 'prompt' stands twice in one object"),
        (b'{"prompt": 1, "n": 1, "n": 1}', "the key 'n' stands twice"),
        (b'{"prompt": 1, "\\u006e": 1, "n": 1}', "the key 'n' stands twice"),
        (b'{"prompt": 1, "user": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        (b'{"' + b"k" * 500 + b'": 1, "' + b"k" * 500 + b'": 1}', "kkk... stands twice"),
    ],
)
def test_what_readers_of_json_read_differently_is_refused(body: bytes, message: str) -> None:
    error = refusal(body)
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)
    assert error.message.startswith("the body is not valid JSON: ")
    assert message in error.message
    assert len(error.message) < 200


def test_no_key_of_a_body_costs_more_than_the_others() -> None:
    keys = b", ".join(b'"%d": 1' % k for k in range(6000))
    assert "stands twice" in refusal(b"{" + keys + b', "0": 1}').message


NEUTRAL = {
    "model": ["digits", None],
    "n": [1, 1.0, "1", None],
    "size": ["28x28", "auto", None],
    "steps": [1, 1.0, "1", None],
    "num_inference_steps": [1, "1", None],
    "response_format": ["b64_json", None],
    "output_format": ["png", None],
    "output_compression": [100, 100.0, "100", None],
    "guidance_scale": [0, 1, 0.0, 1.0, "1", None],
    "user": ["me", "", None],
    "safety_identifier": ["me", None],
    "quality": ["auto", "standard", None],
    "style": [None],
    "background": ["auto", "opaque", None],
    "moderation": ["auto", "low", None],
    "stream": [False, None],
    "partial_images": [0, 0.0, "0", None],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_clients_send_by_themselves_changes_nothing(name: str) -> None:
    plain = order({"prompt": 1, "seed": 3})
    for value in NEUTRAL[name]:
        assert order({"prompt": 1, "seed": 3, name: value}) == plain
    everything = {key: values[0] for key, values in NEUTRAL.items()} | {"frame_count": None}
    assert order({"prompt": 1, "seed": 3, **everything}) == plain


def test_every_field_has_a_neutral_value_and_a_word_for_its_refusal() -> None:
    assert set(NEUTRAL) == set(ImageRequest.model_fields) - {"prompt", "seed"}
    for name in ImageRequest.model_fields:
        error = refusal({"prompt": 1, name: [{}]})
        assert (error.status, error.param) == (400, name)
        assert error.message.startswith(f"{name}=[{{}}] is not allowed: it must be ")


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("7", 7),
        ("7.0", 7),
        ("7e0", 7),
        ('"7"', 7),
        ("9223372036854775807", 2**63 - 1),
        ('"9223372036854775807"', 2**63 - 1),
        ("9223372036854775807.0", 2**63 - 1),
        ("9007199254740993.0", 2**53 + 1),
        ("1e18", 10**18),
    ],
)
def test_an_integer_is_read_exactly_however_it_is_written(text: str, seed: int) -> None:
    assert parse_request(f'{{"prompt": 1, "seed": {text}}}'.encode()).seed == seed


@pytest.mark.parametrize("text", ["9007199254740993.5", "1e999", "1e19", "0.5", '"7.0"', '"1e3"'])
def test_what_is_no_integer_is_not_rounded_to_one(text: str) -> None:
    assert refusal(f'{{"prompt": 1, "seed": {text}}}'.encode()).param == "seed"


def test_steps_may_go_by_the_name_that_diffusers_gives_them() -> None:
    for value in (2, 2.0, "2"):
        assert parse_request(json.dumps({"prompt": 1, "num_inference_steps": value}).encode()) == (
            ImageRequest(prompt=1, steps=2, num_inference_steps=2)
        )
    assert order({"prompt": 1, "steps": "2", "num_inference_steps": 2}).steps == 2
    for steps in (1, "1", "0", "0,16"):
        error = refusal({"prompt": 1, "steps": steps, "num_inference_steps": 2})
        assert (error.status, error.param) == (400, "num_inference_steps")
        assert error.message.startswith("num_inference_steps=2 is not allowed beside steps=")


# No text of all of Unicode: to learn its tables takes Hypothesis longer than the whole test.
LETTERS = "aO9- \x00\n\u0663\u732b\ud800"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(LETTERS, max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=3,
)
# What is nearly right gets furthest.
PLAUSIBLE = {
    "model": st.sampled_from([*CARDS, "dall-e-3", "\ud800"]),
    "prompt": st.integers(-1, 3) | st.text(LETTERS) | st.sampled_from(["One", "9" * 5000]),
    "n": st.integers(0, 17),
    "size": st.sampled_from(["28x28", "256x256", "\ud800"]),
    "seed": st.integers(-1, 2**64),
    "steps": st.integers(0, 3)
    | st.text("01689,:- ٠teacher", max_size=30)
    | st.sampled_from(["teacher", "0,teacher:8-16,16", "teacher:0-49", " 0 , 16 ", "0,,16"]),
    "response_format": st.sampled_from(["b64_json", "url", ""]),
    "output_format": st.sampled_from(["png", "webp", "jpeg", "tiff"]),
    "user": st.text(LETTERS),
    "quality": st.sampled_from(["auto", "standard", "hd"]),
    "num_inference_steps": st.integers(0, 3) | st.sampled_from(["1", "2", "teacher"]),
    "guidance_scale": st.sampled_from([0, 1, 1.0, 7.5]),
    "output_compression": st.integers(-1, 101),
}
BODIES = (
    JSON
    | st.dictionaries(st.sampled_from([*PLAUSIBLE, "sed", ""]), JSON, max_size=9)
    | st.fixed_dictionaries({}, optional={key: v | st.none() for key, v in PLAUSIBLE.items()})
    | st.fixed_dictionaries({"prompt": PLAUSIBLE["prompt"]}, optional={"steps": PLAUSIBLE["steps"]})
)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | BODIES.map(lambda body: json.dumps(body).encode()), st.booleans())
def test_whatever_is_sent_becomes_an_order_or_a_refusal(body: bytes, urls: bool) -> None:
    try:
        made = order(body, urls=urls)
    except RequestError as error:
        assert 400 <= error.status < 500
        assert 0 < len(error.message) < 700
        shown = json.loads(error.body())["error"]
        assert (shown["message"], shown["code"]) == (error.message, error.code)
        return
    card = CARDS[made.model]
    assert 1 <= made.n <= 16
    assert 0 <= made.seed < 2**63
    assert "teacher" not in made.schedule or card.teacher
    if card.conditioning == "class":
        assert isinstance(made.prompt, int)
        assert 0 <= made.prompt < card.num_classes
    else:
        assert isinstance(made.prompt, str)
        made.prompt.encode("utf-8")


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
    entry = json.loads(json.dumps(TAUGHT.entry()))
    assert entry == {
        "id": "taught",
        "object": "model",
        "created": 0,
        "owned_by": "ddray",
        "conditioning": "class",
        "num_classes": 3,
        "class_names": ["zero", "One", "2"],
        "schedule": [0, 16],
        "stages": 49,
        "teacher": "digits-llamagen",
        "size": "28x28",
        "steps": [1, 2, "teacher"],
        "max_n": 16,
        "example_captions": [],
        "max_caption": 0,
    }


def test_the_pure_part_loads_neither_ray_nor_torch() -> None:
    modules = "ddray.serving.schema, ddray.serving.order"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

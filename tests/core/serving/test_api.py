"""What the image service refuses, what it makes of a request, and the bytes of its images."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddray.serving.api import (
    MAX_CAPTION,
    MEDIA_TYPES,
    ImageFormat,
    ImageRequest,
    ModelCard,
    Order,
    RequestError,
    check_request,
    find_class,
    find_prompt,
    find_schedule,
    image_bytes,
    parse_request,
)

CARD = ModelCard(
    id="digits",
    created=0,
    conditioning="class",
    num_classes=3,
    class_names=("zero", "One", "2"),
    schedule=(0, 16),
    stages=49,
    teacher="",
    size="28x28",
)
TAUGHT = replace(CARD, id="taught", teacher="digits-llamagen")
TEXTS = replace(CARD, id="texts", conditioning="text", class_names=(), size="256x256")
CARDS = {card.id: card for card in (CARD, TAUGHT, TEXTS)}


def _order(body: object, cards: Mapping[str, ModelCard] = CARDS, urls: bool = False) -> Order:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return check_request(parse_request(raw), cards, urls)


def _refusal(body: object, cards: Mapping[str, ModelCard] = CARDS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _order(body, cards)
    return caught.value


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
        ({"prompt": 1, "n": 2.0}, "n", "n=2.0"),
        ({"prompt": 1, "n": "2"}, "n", "n='2'"),
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
        ({"prompt": 1, "quality": "hd"}, "quality", "unknown parameter 'quality'; known are model"),
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
        (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"3", "invalid_value"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'{"prompt": NaN}', "invalid_value"),
        (b'{"prompt": 1, "steps": Infinity}', "invalid_value"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, code: str) -> None:
    assert (_refusal(body).status, _refusal(body).code) == (400, code)


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
}
BODIES = (
    JSON
    | st.dictionaries(st.sampled_from([*PLAUSIBLE, "sed", ""]), JSON, max_size=9)
    | st.fixed_dictionaries({}, optional={key: v | st.none() for key, v in PLAUSIBLE.items()})
    | st.fixed_dictionaries({"prompt": PLAUSIBLE["prompt"]}, optional={"steps": PLAUSIBLE["steps"]})
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | BODIES.map(lambda body: json.dumps(body).encode()), st.booleans())
def test_whatever_is_sent_becomes_an_order_or_a_refusal(body: bytes, urls: bool) -> None:
    try:
        order = _order(body, urls=urls)
    except RequestError as error:
        assert 400 <= error.status < 500
        assert 0 < len(error.message) < 700
        shown = json.loads(error.body())["error"]
        assert (shown["message"], shown["code"]) == (error.message, error.code)
        return
    card = CARDS[order.model]
    assert 1 <= order.n <= 16
    assert 0 <= order.seed < 2**63
    assert "teacher" not in order.schedule or card.teacher
    if card.conditioning == "class":
        assert isinstance(order.prompt, int)
        assert 0 <= order.prompt < card.num_classes
    else:
        assert isinstance(order.prompt, str)
        order.prompt.encode("utf-8")


def test_the_first_model_is_the_default_and_others_go_by_name() -> None:
    assert _order({"prompt": 1}).model == "digits"
    assert _order({"prompt": 1, "model": "taught"}).model == "taught"
    assert _order({"prompt": "a cat", "model": "texts"}).prompt == "a cat"


def test_another_model_is_not_found_and_those_that_are_there_are_named() -> None:
    error = _refusal({"prompt": 1, "model": "dall-e-3"})
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.message == (
        "model 'dall-e-3' is not served here; served is 'digits' or 'taught' or 'texts'"
    )


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
        (-1, (), "unknown class -1; valid are class ids 0 to 2"),
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


def test_captions_lose_the_space_around_them_and_nothing_else() -> None:
    assert find_prompt("  A red cat, 猫\u00a0", TEXTS) == "A red cat, 猫"
    assert find_prompt("x" * MAX_CAPTION, TEXTS) == "x" * MAX_CAPTION


@pytest.mark.parametrize(
    "prompt",
    [
        *(3, "", "  ", "a\nb", "a\x00b", "a\ud800", "x" * (MAX_CAPTION + 1)),
        *("<br>", "&lt;br&gt;", "https://example.org/cat.png", "<b> </b> www.example.org"),
    ],
)
def test_what_is_no_caption_is_refused(prompt: int | str) -> None:
    error = _refusal({"prompt": prompt, "model": "texts"})
    assert (error.status, error.code, error.param) == (400, "invalid_value", "prompt")


def test_a_wrong_caption_is_answered_with_what_it_must_be() -> None:
    with pytest.raises(RequestError) as caught:
        find_prompt("", TEXTS)
    assert caught.value.message == (
        "prompt='' is not allowed: texts takes a caption of 1 to 2000 characters on one line"
    )


def test_a_caption_of_markup_alone_is_refused_before_it_fails_a_batch() -> None:
    with pytest.raises(RequestError) as caught:
        find_prompt(" <br> ", TEXTS)
    assert caught.value.message == (
        "prompt=' <br> ' is not allowed: behind markup and addresses it is empty"
    )
    assert find_prompt("<b>A cat</b>", TEXTS) == "<b>A cat</b>"  # the encoder cleans it


def test_steps_are_the_first_jump_or_all_of_them() -> None:
    assert CARD.steps == (1, 2)
    assert _order({"prompt": 0, "steps": 1}).schedule == "0"
    assert _order({"prompt": 0, "steps": 2}).schedule == "0,16"
    assert replace(CARD, schedule=(0, 4, 8)).steps == (1, 3)
    assert replace(CARD, schedule=(0,)).steps == (1,)
    assert TAUGHT.steps == (1, 2, "teacher")


@pytest.mark.parametrize(
    ("steps", "schedule"),
    [
        ("0", "0"),
        (" 0 ,\t16", "0,16"),
        # One schedule has one spelling: requests of a batch are alike by it, and so are metrics.
        ("00,016", "0,16"),
        ("٠,١٦", "0,16"),
        ("teacher", "teacher"),
        ("0,teacher:8-16,16", "0,teacher:8-16,16"),
        ("0, teacher:08-016 ,16", "0,teacher:8-16,16"),
        ("teacher:0-16,16", "teacher:0-16,16"),
        ("teacher:0-49", "teacher:0-49"),
    ],
)
def test_a_schedule_of_the_clients_own_has_one_spelling(steps: str, schedule: str) -> None:
    assert find_schedule(steps, TAUGHT) == schedule
    assert _order({"prompt": 0, "steps": steps, "model": "taught"}).steps == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, "steps=3 is not allowed: taught was trained for 1, 2, 'teacher'"),
        ("3", "schedule '3' begins at stage 3, but nothing has made the stages"),
        ("", "'' is neither a stage number nor"),
        ("Teacher", "'Teacher' is neither a stage number nor"),
        ("0,8", "taught was not trained to jump at 8, only at 0, 16"),
        ("teacher:0-8,8", "taught was not trained to jump at 8, only at 0, 16"),
        ("0,49", "49 must be above the jump before it and below"),
        ("16,0", "schedule '16,0' begins at stage 16"),
        ("0,teacher:16-8", "must name stages in"),
        ("0,teacher:8-16", "behind teacher:8-16 nothing makes"),
        ("0,teacher:8-60,60", "teacher:8-60 must name stages in"),
        ("9" * 180, "use 1, 2, 'teacher'"),
    ],
)
def test_a_schedule_that_cannot_be_had_is_refused_with_those_that_can(
    steps: int | str, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        find_schedule(steps, TAUGHT)
    assert (caught.value.status, caught.value.param) == (400, "steps")
    assert caught.value.code == "invalid_value"
    assert message in caught.value.message


@pytest.mark.parametrize("steps", ["teacher", "0,teacher:8-16,16", "teacher:0-49"])
def test_a_teacher_who_is_not_there_is_named_as_the_reason(steps: str) -> None:
    error = _refusal({"prompt": 0, "steps": steps})
    assert (error.status, error.code, error.param) == (400, "teacher_not_deployed", "steps")
    assert error.message == (
        f"steps={steps!r} needs the teacher, which is not deployed here; use 1, 2"
    )


def test_an_order_holds_what_was_asked_for() -> None:
    asked = {"prompt": "one", "n": 3, "seed": 7, "steps": 2, "output_format": "webp", "user": "me"}
    assert _order(asked) == Order("digits", 1, 3, 7, 2, "0,16", "webp")


def test_links_are_given_where_they_are_configured() -> None:
    asked = {"prompt": 1, "response_format": "url"}
    assert _order(asked, urls=True).as_url
    assert not _order({"prompt": 1}, urls=True).as_url
    error = _refusal(asked)
    assert (error.status, error.code) == (400, "url_not_configured")
    assert "POST /v1/images/raw for the bytes of one image" in error.message


def test_an_absent_seed_is_drawn_anew_and_fits_every_reader_of_json() -> None:
    seeds = {_order({"prompt": 0}).seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert _order({"prompt": 0, "seed": 0}).seed == 0


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
    }


def _gradient(channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    levels = np.arange(32 * 48 * channels) // (6 * channels) % 256
    return levels.astype(np.uint8).reshape((32, 48, channels) if channels > 1 else (32, 48))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_exactly(channels: int) -> None:
    pixels = _gradient(channels)
    picture = Image.open(io.BytesIO(image_bytes(pixels)))
    assert (picture.format, picture.mode) == ("PNG", "L" if channels == 1 else "RGB")
    assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_webp_and_jpeg_are_near_the_pixels(output_format: ImageFormat, channels: int) -> None:
    pixels = _gradient(channels)
    picture = Image.open(io.BytesIO(image_bytes(pixels, output_format)))
    assert (picture.format, picture.size) == (output_format.upper(), (48, 32))
    seen = np.asarray(picture.convert("L" if channels == 1 else "RGB"), dtype=int)
    assert np.abs(seen - pixels).mean() < 4


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_the_same_pixels_give_the_same_file(output_format: ImageFormat) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert image_bytes(pixels, output_format) == image_bytes(pixels.copy(), output_format)
    # Rows of a batch are views of it.
    batch = np.stack([pixels, pixels])[:, :, ::-1][:, :, ::-1]
    assert image_bytes(batch[1], output_format) == image_bytes(pixels, output_format)


def test_the_pure_part_loads_neither_ray_nor_torch() -> None:
    code = "import sys, ddray.serving.api; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

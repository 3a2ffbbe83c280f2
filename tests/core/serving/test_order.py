"""What the served students make of a request, and what they cannot."""

import hashlib
from dataclasses import replace

import pytest

from ddray.errors import ConfigError
from ddray.serving.api import MAX_CAPTION, RequestError
from ddray.serving.order import (
    EXAMPLE_CAPTIONS,
    Order,
    find_class,
    find_examples,
    find_prompt,
    find_schedule,
)
from ddray.serving.rendering import ImageJob
from tests.core.serving.cards import CARD, TAUGHT, TEXTS, order, refusal


def test_the_first_model_is_the_default_and_others_go_by_name() -> None:
    assert order({"prompt": 1}).model == "digits"
    assert order({"prompt": 1, "model": "taught"}).model == "taught"
    assert order({"prompt": "a cat", "model": "texts"}).prompt == "a cat"


def test_another_model_is_not_found_and_those_that_are_there_are_named() -> None:
    error = refusal({"prompt": 1, "model": "dall-e-3"})
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
    "caption", ["\U0001f469\u200d\U0001f692", "a red\u00a0apple", "\u200fتفاحة حمراء", "re\u00add"]
)
def test_captions_may_hold_what_is_seen_only_by_what_it_does(caption: str) -> None:
    """A joiner, a space that breaks no line, a mark of direction, a soft hyphen."""
    assert find_prompt(caption, TEXTS) == caption


@pytest.mark.parametrize(
    "prompt",
    [
        *(3, "", "  ", "a\nb", "a\u2028b", "a\x00b", "a\ud800", "x" * (MAX_CAPTION + 1)),
        *("\u200b", "<b>\u200d\u200f</b>"),
        *("<br>", "&lt;br&gt;", "https://example.org/cat.png", "<b> </b> www.example.org"),
    ],
)
def test_what_is_no_caption_is_refused(prompt: int | str) -> None:
    error = refusal({"prompt": prompt, "model": "texts"})
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
        "prompt=' <br> ' is not allowed: texts takes a caption that says something beside markup, "
        "addresses and invisible characters"
    )
    assert find_prompt("<b>A cat</b>", TEXTS) == "<b>A cat</b>"  # the encoder cleans it


def test_what_a_log_holds_of_a_caption_is_its_length_and_a_hash() -> None:
    caption = "my neighbour's medical record"
    asked = order({"prompt": f" {caption} ", "model": "texts", "seed": 7})
    shown = {
        "model": "texts",
        "prompt_length": 29,
        # printf '%s' "my neighbour's medical record" | sha256sum | cut -c -12
        "prompt_sha256": hashlib.sha256(caption.encode()).hexdigest()[:12],
        "n": 1,
        "steps": 1,
        "seed": 7,
    }
    assert asked.logged() == shown
    assert asked.logged(in_full=True)["prompt"] == caption
    assert "neighbour" not in repr(asked)
    assert "neighbour" not in repr(ImageJob(caption, 0, 7))


def test_a_class_is_no_secret_of_a_log() -> None:
    assert order({"prompt": "one", "seed": 7}).logged()["prompt"] == 1


def test_examples_are_those_of_the_card_or_neutral_ones() -> None:
    card = {"example_captions": ["red apple", "woman firefighter"]}
    assert find_examples(card, "texts") == ("red apple", "woman firefighter")
    for config in ({}, {"example_captions": []}):
        assert find_examples(config, "texts") == EXAMPLE_CAPTIONS


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("red apple", "texts: example_captions='red apple' is no list of captions"),
        ({"a": 1}, "is no list of captions"),
        ([3], "texts: example_captions has 3; it takes captions"),
        (["a", "b\nc"], r"has 'b\\nc'; it takes a caption of 1 to 2000 characters on one line"),
        (["<br>"], "has '<br>'; it takes a caption that says something"),
    ],
)
def test_examples_that_the_service_would_refuse_are_refused(examples: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_examples({"example_captions": examples}, "texts")


def test_steps_are_the_first_jump_or_all_of_them() -> None:
    assert CARD.steps == (1, 2)
    assert order({"prompt": 0, "steps": 1}).schedule == "0"
    assert order({"prompt": 0, "steps": 2}).schedule == "0,16"
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
    assert order({"prompt": 0, "steps": steps, "model": "taught"}).steps == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, "steps=3 is not allowed: taught was trained for 1, 2, 'teacher'"),
        ("3,16", "nothing has made the stages before it; begin with 0 or teacher:0-...; use 1, 2"),
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
    error = refusal({"prompt": 0, "steps": steps})
    assert (error.status, error.code, error.param) == (400, "teacher_not_deployed", "steps")
    assert error.message == (
        f"steps={steps!r} needs the teacher, which is not deployed here; use 1, 2"
    )


def test_an_order_holds_what_was_asked_for() -> None:
    asked = {"prompt": "one", "n": 3, "seed": 7, "steps": 2, "output_format": "webp", "user": "me"}
    assert order(asked) == Order("digits", 1, 3, 7, 2, "0,16", "webp")


def test_a_number_of_steps_may_come_as_text_and_0_is_a_schedule() -> None:
    for steps in (2, "2"):
        made = order({"prompt": 0, "steps": steps})
        assert (made.steps, made.schedule) == (2, "0,16")
    made = order({"prompt": 0, "steps": "0"})
    assert (made.steps, made.schedule) == ("0", "0")


def test_the_compression_that_is_asked_for_reaches_webp_and_jpeg() -> None:
    for kind in ("webp", "jpeg"):
        made = order({"prompt": 0, "output_format": kind, "output_compression": 40})
        assert made.quality == 40
    assert order({"prompt": 0, "output_format": "webp"}).quality == 90


@pytest.mark.parametrize("steps", ["teacher", "0,teacher:8-16,16"])
def test_the_teacher_takes_no_guidance_from_a_request(steps: str) -> None:
    asked = {"prompt": 0, "model": "taught", "steps": steps}
    assert order({**asked, "guidance_scale": None}).schedule == steps
    error = refusal({**asked, "guidance_scale": 1})
    assert (error.status, error.param) == (400, "guidance_scale")
    assert "which has a guidance of its own; leave it out" in error.message


def test_links_are_given_where_they_are_configured() -> None:
    asked = {"prompt": 1, "response_format": "url"}
    assert order(asked, urls=True).as_url
    assert not order({"prompt": 1}, urls=True).as_url
    error = refusal(asked)
    assert (error.status, error.code) == (400, "url_not_configured")
    assert "POST /v1/images/raw for the bytes of one image" in error.message


def test_an_absent_seed_is_drawn_anew_and_fits_every_reader_of_json() -> None:
    seeds = {order({"prompt": 0}).seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert order({"prompt": 0, "seed": 0}).seed == 0

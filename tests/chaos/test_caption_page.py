"""The page at / for students of captions, beside one of classes, in a real Chromium."""

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.chaos.page import (
    CHROMIUM,
    CONTROLS,
    FAINT,
    FOCUS,
    KEY,
    NAMELESS,
    PATH,
    Visit,
    finish,
    page_of,
    radio,
    sources,
)
from tests.patience import PATIENCE_S
from tests.runtime.tiny import write_text_student

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium (make browser)"),
]

PHONE = {"width": 390, "height": 844}
EXAMPLES = ("a red cat", "the roof", "a cat on the red roof", "قطة حمراء")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    student, encoder = write_text_student(tmp_path_factory.mktemp("texts"), EXAMPLES)
    both = f"{student},digits-llamagen-dd"
    with page_of("--student", both, "--teacher", "--text-encoder", encoder) as (url, _):
        yield url


def _made(url: str, **order: Any) -> list[bytes]:
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{url}{PATH}", json=order, headers=headers, timeout=PATIENCE_S, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


def _caption(page: Page) -> Any:
    return page.get_by_label("Caption", exact=True)


def test_a_caption_typed_is_seen_side_by_side(visit: Callable[..., Visit], url: str) -> None:
    tab = visit()
    page = tab.open()
    expect(page.get_by_role("heading", level=1)).to_have_text("One step instead of 16")
    expect(page.locator("#rows")).to_contain_text("Write a caption, or press an example")
    page.get_by_label("Images", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).fill("5")
    _caption(page).fill("<b>it's</b> a red cat")
    _caption(page).press("Enter")
    expect(page.locator("#title")).to_have_text("3 × “<b>it's</b> a red cat”, seed 5")
    finish(page)
    rows = page.locator("#rows").get_by_role("group")
    assert rows.evaluate_all("rows => rows.map((row) => row.getAttribute('aria-label'))") == [
        *("1 step", "2 steps", "Teacher")
    ]
    order = {"model": "words", "prompt": "<b>it's</b> a red cat", "n": 3, "seed": 5}
    for row, steps in enumerate((1, 2, "teacher")):
        assert tab.orders()[row] == {**order, "steps": steps}
        assert sources(rows.nth(row)) == _made(url, **order, steps=steps)
    alts = rows.nth(0).locator("img").evaluate_all("images => images.map((image) => image.alt)")
    assert alts[2] == "“<b>it's</b> a red cat”, 1 step, seed 5, image 3 of 3"
    page.get_by_text("The same from a terminal").click()
    expect(page.locator("#curl")).to_contain_text(r"<b>it'\''s</b> a red cat")
    assert tab.complaints == []


def test_an_example_is_written_and_made_by_one_press(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "1 step").check()
    examples = page.get_by_role("list", name="Examples").get_by_role("button")
    expect(examples).to_have_text([*EXAMPLES])
    examples.nth(2).click()
    expect(_caption(page)).to_have_value(EXAMPLES[2])
    expect(page.locator("#title")).to_contain_text(f"“{EXAMPLES[2]}”")
    finish(page)
    assert [order["prompt"] for order in tab.orders()] == [EXAMPLES[2]]
    assert examples.nth(3).evaluate("node => getComputedStyle(node).direction") == "rtl"


def test_classes_and_captions_each_have_their_control(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "1 step").check()
    _caption(page).fill("the roof")
    page.get_by_label("Model").select_option("digits-llamagen-dd")
    expect(_caption(page)).to_be_hidden()
    expect(page.get_by_role("list", name="Examples")).to_be_hidden()
    radio(page, "7").check()
    page.locator("#go").click()  # whatever the box that is not there holds
    expect(page.locator("#title")).to_contain_text("class 7")
    finish(page)
    page.get_by_label("Model").select_option("words")
    expect(page.locator("#classes")).to_be_hidden()
    expect(_caption(page)).to_have_value("the roof")
    page.locator("#go").click()
    expect(page.locator("#title")).to_contain_text("“the roof”")
    finish(page)
    assert [order["prompt"] for order in tab.orders()] == [7, "the roof"]
    _caption(page).fill("")
    page.get_by_label("Model").select_option("digits-llamagen-dd")
    page.locator("#go").click()
    finish(page)
    assert len(tab.orders()) == 3


def test_how_long_a_caption_may_be_is_said_and_held(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "1 step").check()
    hint = page.locator("#caption-hint")
    expect(hint).to_have_text("Up to 2000 characters; Enter sends.")
    assert _caption(page).get_attribute("aria-describedby") == "caption-hint"
    for nothing in ("", "  \n "):
        _caption(page).fill(nothing)
        page.locator("#go").click()
        expect(_caption(page)).to_be_focused()
        told = _caption(page).evaluate("node => node.validationMessage")
        assert told == "Write a caption, or press one of the examples."
    # Counted as the service counts: an emoji is one.
    _caption(page).fill("🐈" * 2001)
    expect(hint).to_have_text("2001 of at most 2000 characters.")
    expect(hint).to_have_class(re.compile("over"))
    page.locator("#go").click()
    assert tab.orders() == []
    _caption(page).fill("🐈" * 2000)
    expect(hint).not_to_have_class(re.compile("over"))
    page.locator("#go").click()
    finish(page)
    assert tab.orders()[0]["prompt"] == "🐈" * 2000
    expect(page.locator("#title")).to_contain_text(f"“{'🐈' * 80}…”")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    # What is pasted becomes one line.
    _caption(page).fill(" a red\n\n\tcat ")
    _caption(page).press("Enter")
    finish(page)
    assert tab.orders()[1]["prompt"] == "a red cat"


def test_an_enter_that_ends_a_composition_sends_nothing(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    _caption(page).fill("猫")
    for composing in ("{ isComposing: true }", "{ keyCode: 229 }"):
        event = f"new KeyboardEvent('keydown', {{ key: 'Enter', ...{composing} }})"
        _caption(page).evaluate(f"node => node.dispatchEvent({event})")
    assert page.locator("#result").get_attribute("aria-busy") != "true"
    assert tab.orders() == []


def test_captions_by_keyboard_alone(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    expect(page.locator("#go")).to_be_visible()

    def tab_to(expected: str) -> None:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUS)
        assert (name, seen) == (expected, True)

    tab_to("model")
    tab_to("caption")
    page.keyboard.type("the red roof")
    tab_to("button")  # the examples are one stop
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name=EXAMPLES[1], exact=True)).to_be_focused()
    tab_to("steps")
    page.keyboard.press("ArrowRight")
    tab_to("count")
    page.keyboard.type("2")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name=EXAMPLES[1], exact=True)).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    finish(page)
    (order,) = tab.orders()
    assert (order["prompt"], order["n"], order["steps"]) == ("the red roof", 2, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_everything_has_a_name_and_can_be_read(
    visit: Callable[..., Visit], url: str, scheme: str
) -> None:
    tab = visit(color_scheme=scheme, viewport=PHONE, has_touch=True)
    page = tab.open()
    _caption(page).fill("a cat " * 300)
    page.get_by_role("button", name=EXAMPLES[0], exact=True).tap()
    finish(page)
    expect(_caption(page)).to_have_value(EXAMPLES[0])
    assert page.evaluate("scrollY") > 100  # to the images, below the form
    _caption(page).press("Enter")
    expect(_caption(page)).not_to_be_focused()  # so that no keyboard lies over them
    finish(page)
    _caption(page).fill("a cat " * 400)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(NAMELESS) == []
    count, faint = page.evaluate(FAINT)
    assert count > 30
    assert faint == []
    small = "nodes => nodes.filter((n) => n.checkVisibility() && n.offsetHeight < 44).length"
    assert page.locator(CONTROLS).evaluate_all(small) == 0
    assert all(request.startswith((url, "data:")) for request in tab.requests)
    assert tab.complaints == []

"""The page at / in a real Chromium, of the real `ddray serve` with two students and teachers."""

import base64
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.chaos.job import Job
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
    generate,
    page_of,
    radio,
    sources,
)
from tests.chaos.service import standing_still
from tests.patience import PATIENCE_S, wait_until

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium (make browser)"),
]

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Job]]:
    """A service and its base URL; it asks for a key and admits 16 images at a time."""
    with page_of("--student", "digits-llamagen-dd,digits-var-dd", "--teacher") as service:
        yield service


@pytest.fixture(scope="module")
def url(served: tuple[str, Job]) -> str:
    return served[0]


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False) as client:
        yield client


def _made(api: httpx.Client, **order: Any) -> list[bytes]:
    answer = api.post(PATH, json=order)
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


@pytest.mark.smoke
def test_images_are_those_of_the_api(visit: Callable[..., Visit], api: httpx.Client) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "7").check()
    radio(page, "2 steps").check()
    page.get_by_label("Images", exact=True).fill("3")
    # 2^53 - 1: beyond it, JavaScript would change a seed.
    page.get_by_label("Seed", exact=True).fill("9007199254740991")
    expect(page.locator("#go")).to_have_text("Generate")
    generate(page)
    order = {"model": "digits-llamagen-dd", "prompt": 7, "n": 3, "seed": 2**53 - 1}
    assert sources(page.locator("#rows")) == _made(api, **order, steps=2)
    expect(page.locator("#rows .time")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.locator("#said")).to_contain_text("Done. 2 steps: ")
    alts = page.locator("#rows img").evaluate_all("images => images.map((image) => image.alt)")
    assert alts[2] == "class 7, 2 steps, seed 9007199254740991, image 3 of 3"
    with page.expect_download() as download:
        page.locator("#rows a").first.click()
    assert Path(download.value.path()).read_bytes() == sources(page.locator("#rows"))[0]

    page.get_by_label("Seed", exact=True).fill("")
    generate(page)
    drawn = tab.orders()[-1]["seed"]
    assert 0 <= drawn < 2**32
    page.get_by_role("button", name="Keep this seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(drawn))
    expect(page.get_by_label("Seed", exact=True)).to_be_focused()

    past = page.get_by_role("list", name="Recent").get_by_role("button")
    expect(past).to_have_count(2)
    past.nth(1).click()
    expect(page.locator("#title")).to_have_text("3 × class 7, seed 9007199254740991")
    page.get_by_text("The same from a terminal").click()
    command = page.locator("#curl").inner_text()
    assert KEY not in command
    assert '-H "authorization: Bearer $DDRAY_API_KEY"' in command
    assert '{"model":"digits-llamagen-dd","prompt":7,"seed":9007199254740991,"steps":2}' in command
    assert command.endswith("-o class-7-2-steps.png")
    assert page.locator("meta[name=description]").get_attribute("content")
    assert tab.complaints == []


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_commands_for_a_terminal_give_pictures(
    visit: Callable[..., Visit], tmp_path: Path
) -> None:
    page = visit().open()
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Seed", exact=True).fill("9223372036854775807")  # as large as it can be
    generate(page)
    images = sources(page.locator("#rows"))
    page.get_by_text("The same from a terminal").click()
    command = page.locator("#curl").inner_text()
    shell = {**os.environ, "DDRAY_API_KEY": KEY, "no_proxy": "*"}
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=shell, check=True, capture_output=True)
    names = ["class-0-1-step.png", "class-0-2-steps.png", "class-0-teacher.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == images[::2]
    expect(page.locator("#curl-hint")).to_contain_text("writes the first image of its row")


def test_a_seed_beyond_what_javascript_counts_to_is_kept(
    visit: Callable[..., Visit], api: httpx.Client
) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "1 step").check()
    page.get_by_label("Images", exact=True).fill("1")
    seed, field = 2**53 + 1, page.get_by_label("Seed", exact=True)
    field.fill(str(seed))
    generate(page)
    assert tab.orders()[-1]["seed"] == str(seed)
    assert sources(page.locator("#rows")) == _made(api, prompt=0, seed=seed)
    expect(page.locator("#title")).to_have_text(f"1 × class 0, seed {seed}")
    field.fill("")
    page.get_by_role("button", name="Keep this seed").click()
    expect(field).to_have_value(str(seed))
    for wrong in (str(2**63), "-1", "1.5", "x"):
        field.fill(wrong)
        page.locator("#go").click()
        assert not field.evaluate("node => node.validity.valid"), wrong
    assert len(tab.orders()) == 1


def test_an_image_is_saved_as_png(visit: Callable[..., Visit]) -> None:
    page = visit().open()
    radio(page, "2 steps").check()
    page.get_by_label("Images", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).fill("5")
    generate(page)
    third = page.get_by_role("link").nth(2)
    expect(third).to_have_attribute("title", "Save as PNG")
    shown = "node => [getComputedStyle(node, '::after')].map((s) => [s.content, s.opacity])[0]"
    assert third.evaluate(shown) == ['"Save as PNG"', "0"]
    third.hover()
    assert third.evaluate(shown) == ['"Save as PNG"', "1"]
    with page.expect_download() as download:
        third.click()
    assert download.value.suggested_filename == "digits-llamagen-dd-0-seed5-2-2.png"
    assert Path(download.value.path()).read_bytes() == sources(page.locator("#rows"))[2]
    expect(page.locator("#save-hint")).to_contain_text("saved as PNG by a click on it, or by Enter")


def test_a_list_is_one_stop_of_the_tab_key(visit: Callable[..., Visit]) -> None:
    page = visit().open()
    page.get_by_label("Images", exact=True).fill("4")
    for _ in range(3):
        generate(page)
    stops = "nodes => nodes.filter((node) => node.tabIndex === 0).length"
    assert page.locator("#rows a").evaluate_all(stops) == 1
    assert page.locator("#recent button").evaluate_all(stops) == 1
    links = page.locator("#rows a")
    links.first.focus()
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowDown", 5),  # the same noise, the other way
        ("ArrowDown", 9),
        ("ArrowDown", 9),
        ("ArrowUp", 5),
        ("ArrowLeft", 4),
        ("End", 11),
        ("ArrowRight", 11),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        expect(links.nth(place)).to_be_focused()
        assert links.evaluate_all(stops) == 1
    past = page.get_by_role("list", name="Recent").get_by_role("button")
    past.first.focus()
    page.keyboard.press("End")
    expect(past.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(past.nth(2)).to_have_attribute("aria-current", "true")


def test_what_was_made_before_says_what_it_is(visit: Callable[..., Visit]) -> None:
    page = visit().open()
    page.get_by_label("Images", exact=True).fill("1")
    radio(page, "4").check()
    generate(page)
    radio(page, "2 steps").check()
    generate(page)
    single, compared = page.locator("#recent button").all()
    expect(single).to_have_text(re.compile(r"^class 42 steps: [\d.]+ m?s$"))
    expect(compared).to_have_text(re.compile(r"^class 4([\d.]+× faster|1 step: [\d.]+ m?s)$"))


def test_windows_high_contrast_leaves_every_shape(visit: Callable[..., Visit]) -> None:
    tab = visit(forced_colors="active")
    page = tab.open()
    generate(page)
    edge = """node => {
      const style = getComputedStyle(node);
      const opaque = (colour) => !/^rgba\\(.*, 0\\)$/.test(colour);
      return [parseFloat(style.borderTopWidth) >= 1 && opaque(style.borderTopColor),
        style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    }"""
    for shape in ("#go", "#rows .bar", ".chips span"):
        assert page.locator(shape).first.evaluate(edge)[0], shape
    chosen = page.locator("#classes input:checked + span")
    assert chosen.evaluate(edge)[1]
    assert not page.locator("#classes input:not(:checked) + span").first.evaluate(edge)[1]
    ground = "node => getComputedStyle(node).backgroundColor"
    for row in page.locator("#rows .bar").all():
        assert row.locator("i").evaluate(ground) != row.evaluate(ground)
    assert tab.complaints == []


def test_without_javascript_it_says_so(visit: Callable[..., Visit]) -> None:
    page = visit(key=None, java_script_enabled=False).open()
    told = page.locator("header").inner_text()
    assert "This page needs JavaScript" in told
    assert "Looking for the models" not in told


def test_side_by_side_on_the_same_noise(visit: Callable[..., Visit], api: httpx.Client) -> None:
    tab = visit(reduced_motion="no-preference")
    page = tab.open()
    expect(page.get_by_role("heading", level=1)).to_have_text("One step instead of 49")
    page.get_by_label("Model").select_option("digits-var-dd")
    expect(page.get_by_role("heading", level=1)).to_have_text("One step instead of 5")
    radio(page, "3").check()
    page.get_by_label("Images", exact=True).fill("4")
    page.get_by_role("button", name="Compare").click()  # one click
    finish(page)
    rows = page.locator("#rows").get_by_role("group")
    assert rows.evaluate_all("rows => rows.map((row) => row.getAttribute('aria-label'))") == [
        *("1 step", "2 steps", "Teacher")
    ]
    orders = tab.orders()
    assert [order.pop("steps") for order in orders] == [1, 2, "teacher"]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0]["model"] == "digits-var-dd"
    for row, steps in enumerate((1, 2, "teacher")):
        assert sources(rows.nth(row)) == _made(api, **orders[0], steps=steps)
    # One after another, or they would slow each other down.
    times = [a.request.timing for a in tab.answers if a.url.endswith(PATH)]
    for earlier, later in zip(times, times[1:], strict=False):
        assert later["startTime"] >= earlier["startTime"] + earlier["responseEnd"] - 5

    shown = [_ms(rows.nth(row).locator(".time").inner_text()) for row in range(3)]
    assert shown[2] == pytest.approx(times[2]["responseEnd"], abs=150, rel=0.1)
    for row in range(2):
        gain = rows.nth(row).locator(".gain")
        if shown[2] > 1.1 * shown[row]:
            ratio = float(gain.inner_text().removesuffix("× faster"))
            assert ratio == pytest.approx(shown[2] / shown[row], rel=0.06)
    reasons = page.locator("#rows .why:visible")
    if shown[2] < 3 * shown[0] and shown[2] > 1.1 * shown[0]:
        expect(reasons).to_have_count(1)
        expect(reasons).to_contain_text("Why not 5×?")
    expect(rows.nth(2).locator(".gain")).to_be_hidden()
    expect(page.locator("#said")).to_have_text(
        re.compile(r"Done\. 1 step: [\d.]+ times as fast as the 5 steps of the teacher\.")
    )
    assert tab.complaints == []


def _ms(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


def test_stopping_keeps_what_is_there(visit: Callable[..., Visit]) -> None:
    page = visit().open()
    page.get_by_label("Images", exact=True).fill("16")
    page.locator("#go").click()
    expect(page.get_by_role("group", name="1 step").locator("img")).to_have_count(16)
    page.get_by_role("button", name="Stop").click()
    finish(page)
    expect(page.get_by_role("group", name="Teacher")).to_have_count(0)
    expect(page.get_by_role("group", name="1 step").locator("img")).to_have_count(16)
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#go")).to_be_focused()


# What the button has said, however short.
TOLD = """window.told = [];
new MutationObserver(() => told.push(document.getElementById("again")?.textContent))
  .observe(document, { subtree: true, childList: true, characterData: true });"""


def test_busy_is_said_and_offered_again(
    visit: Callable[..., Visit], api: httpx.Client, served: tuple[str, Job]
) -> None:
    tab = visit()
    tab.page.add_init_script(TOLD)
    page = tab.open()
    radio(page, "1 step").check()
    order = {"prompt": 1, "n": 9, "steps": "teacher", "seed": 1}

    def occupy() -> None:
        while api.post(PATH, json=order).status_code == 503:
            pass  # a probe below came first

    def is_busy() -> bool:
        try:
            probe = {"prompt": 1, "n": 16}  # as many as there may be, so that they must be alone
            return api.post(PATH, json=probe, timeout=1).status_code == 503
        except httpx.TimeoutException:
            return False

    other = threading.Thread(target=occupy)
    with standing_still(served[1]):
        other.start()
        wait_until(is_busy, "busy service")
        page.locator("#go").click()
        alert = page.get_by_role("alert").and_(page.locator("#problem"))
        expect(alert).to_have_text(re.compile("^The service is busy just now"))
    again = page.locator("#again")
    other.join()
    expect(again).to_have_text("Try again")
    again.click()
    expect(page.locator("#rows img")).to_have_count(8)
    expect(page.locator("#error")).to_be_hidden()
    refused, repeated = tab.orders()
    assert refused == repeated
    assert "Try again in 1 s" in page.evaluate("told")  # as long as Retry-After says


def test_a_key_is_asked_for_and_kept_in_this_tab_only(visit: Callable[..., Visit]) -> None:
    tab = visit(key=None)
    page = tab.open()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(page.locator("#form")).to_be_hidden()
    page.keyboard.type("another-key-0123456")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_have_text("This API key is not accepted.")
    expect(field).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#go")).to_be_focused()
    expect(page.locator("#key-form")).to_be_hidden()
    radio(page, "1 step").check()
    page.keyboard.press("Enter")
    expect(page.locator("#rows img")).to_have_count(8)
    assert page.evaluate("sessionStorage.getItem('ddray-key')") == KEY
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert not any(KEY in request for request in tab.requests)
    assert not any("Content Security" in text for text in tab.complaints)

    # A key that is withdrawn later: the same field, and what was there stays.
    page.evaluate("sessionStorage.setItem('ddray-key', 'withdrawn-key-01234')")
    page.locator("#go").click()
    expect(field).to_be_focused()
    expect(page.locator("#rows img")).to_have_count(8)


def test_it_can_be_used_by_keyboard_alone(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    expect(page.locator("#go")).to_be_visible()

    def tabs(count: int) -> list[str]:
        names = []
        for _ in range(count):
            page.keyboard.press("Tab")
            name, seen = page.evaluate(FOCUS)
            assert seen, f"nothing shows that {name} has the focus"
            names.append(name)
        return names

    assert tabs(2) == ["model", "class"]
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert tabs(1) == ["steps"]
    page.keyboard.press("ArrowRight")
    assert tabs(1) == ["count"]
    page.keyboard.type("2")
    assert tabs(1) == ["seed"]
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    finish(page)
    (order,) = tab.orders()
    assert order == {"model": "digits-llamagen-dd", "prompt": 4, "n": 2, "seed": 5, "steps": 1}
    assert tabs(5) == ["go", "keep", "a", "button", "summary"]
    page.keyboard.press("Enter")
    expect(page.locator("#curl")).to_be_visible()
    assert tabs(2) == ["pre", "copy"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(
    visit: Callable[..., Visit], url: str, scheme: str
) -> None:
    tab = visit(color_scheme=scheme, viewport=PHONE, has_touch=True)
    page = tab.open()
    page.get_by_label("Model").select_option("digits-var-dd")
    page.get_by_label("Images", exact=True).fill("5")
    generate(page)
    # On a phone the images stand below the form, and come into view.
    assert page.evaluate("scrollY") > 100
    page.get_by_text("The same from a terminal").click()
    page.evaluate("document.getElementById('error').hidden = false")
    page.evaluate("document.getElementById('problem').textContent = 'Something'")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(NAMELESS) == []
    count, faint = page.evaluate(FAINT)
    assert count > 40
    assert faint == []
    small = "nodes => nodes.filter((n) => n.checkVisibility() && n.offsetHeight < 44).length"
    assert page.locator(CONTROLS).evaluate_all(small) == 0
    levels = "nodes => nodes.filter((n) => n.checkVisibility()).map((n) => n.localName)"
    headings = page.locator("h1, h2, h3").evaluate_all(levels)
    assert headings == ["h1", "h2", "h3", "h3", "h3", "h2"]
    assert page.locator("html").get_attribute("lang") == "en"
    for role, number in (("banner", 1), ("main", 1), ("status", 2)):
        assert page.get_by_role(role).count() == number
    repeated = "all => all.map((n) => n.id).filter((id, k, ids) => ids.indexOf(id) !== k)"
    assert page.locator("[id]").evaluate_all(repeated) == []
    # Nothing from elsewhere, and nothing that the policy forbids.
    assert all(request.startswith((url, "data:")) for request in tab.requests)
    assert tab.complaints == []


def test_reduced_motion_means_none(visit: Callable[..., Visit]) -> None:
    moving = "() => document.getAnimations().length"
    for wish, least in (("no-preference", 1), ("reduce", 0)):
        page = visit(reduced_motion=wish).open()
        page.locator("#go").click()
        expect(page.get_by_role("group", name="Teacher")).to_have_class(re.compile("pending"))
        assert min(page.evaluate(moving), 1) == least
        page.get_by_role("button", name="Stop").click()


def test_many_classes_and_no_teacher(visit: Callable[..., Visit]) -> None:
    card = {"id": "big", "conditioning": "class", "num_classes": 1000}
    card |= {"class_names": [f"thing <{k}>" for k in range(1000)]}
    card |= {"stages": 256, "teacher": "", "size": "256x256", "steps": [1, 2], "max_n": 16}
    card |= {"example_captions": [], "max_caption": 0}
    tab = visit()
    page = tab.page
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [card]}))
    pixel = base64.b64encode(b"no image").decode()

    def answer(route: Any) -> None:
        n = route.request.post_data_json["n"]
        route.fulfill(json={"data": [{"b64_json": pixel, "index": k} for k in range(n)]})

    page.route(f"**{PATH}", answer)
    tab.open()
    page.get_by_label("Class").select_option("thing <701>")
    generate(page)
    assert page.locator("#rows").get_by_role("group").count() == 2
    expect(page.locator("#title")).to_contain_text("8 × thing <701>, seed")
    expect(page.locator("#rows .gain:visible")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_an_unreachable_service_is_said(visit: Callable[..., Visit]) -> None:
    tab = visit()
    page = tab.open()
    radio(page, "1 step").check()
    page.route(f"**{PATH}", lambda route: route.abort())
    page.locator("#go").click()
    expect(page.locator("#problem")).to_have_text("The service cannot be reached.")
    page.unroute(f"**{PATH}")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#rows img")).to_have_count(8)

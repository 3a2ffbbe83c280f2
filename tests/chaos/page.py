"""The page of a service in a real Chromium, and what can be seen of it."""

import base64
import contextlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Response, expect

from tests.chaos.job import Job
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE_S

CHROMIUM = shutil.which("chromium")
KEY = "a-key-of-the-tests-0123"
PATH = "/v1/images/generations"
PREFIX = "data:image/png;base64,"
# Generous: these machines are shared, and the teacher is slow.
expect.set_options(timeout=1000 * PATIENCE_S)


@contextlib.contextmanager
def page_of(*arguments: str) -> Iterator[tuple[str, Job]]:
    """`ddray serve` of some students, which asks for a key and admits 16 images at a time."""
    port = free_port()
    small = ["--set", "max_batch_size=16", "--set", "max_images=16"]
    job = Job("serve", "--port", str(port), *arguments, *small, DDRAY_API_KEYS=KEY)
    try:
        url = f"http://127.0.0.1:{port}"
        job.until(lambda: is_ready(url))
        yield url, job
        job.process.send_signal(signal.SIGINT)
        assert job.end()[0] in (0, 130)
    finally:
        job.end_by_force()


class Visit:
    """A tab of its own, and all that it asked for and complained of."""

    def __init__(self, browser: Browser, url: str, key: str | None = KEY, **context: Any):
        context = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"} | context
        self.page: Page = browser.new_context(**context).new_page()
        self.requests: list[str] = []
        self.answers: list[Response] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        if key:
            self.page.add_init_script(f"sessionStorage.setItem('ddray-key', '{key}')")
        self.url = url

    def open(self) -> Page:
        self.page.goto(self.url)
        return self.page

    def orders(self) -> list[dict[str, Any]]:
        """What images were asked for."""
        posts = [answer.request for answer in self.answers if answer.url.endswith(PATH)]
        return [post.post_data_json for post in posts]


def radio(page: Page, name: str) -> Locator:
    return page.get_by_role("radio", name=name, exact=True)


def generate(page: Page) -> None:
    page.locator("#go").click()
    finish(page)


def finish(page: Page) -> None:
    expect(page.locator("#result")).to_have_attribute("aria-busy", "false")


def sources(rows: Locator) -> list[bytes]:
    sources = rows.locator("img").evaluate_all("images => images.map((image) => image.src)")
    assert all(source.startswith(PREFIX) for source in sources)
    return [base64.b64decode(source.removeprefix(PREFIX)) for source in sources]


FOCUS = """() => {
  const node = document.activeElement, radio = node.type === "radio";
  const style = getComputedStyle(radio ? node.nextElementSibling : node);
  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return [radio ? node.name : node.id || node.localName, seen];
}"""


CONTROLS = "button, select, input, textarea"
NAMELESS = f"""() => [...document.querySelectorAll("{CONTROLS}, a, img, [role=group]")]
  .filter((node) => node.checkVisibility())
  .filter((node) => {{
    const label = node.labels?.[0]?.textContent ?? node.getAttribute("aria-label");
    const inside = node.textContent.trim() || node.querySelector("img")?.alt;
    return node.localName === "img" ? !node.hasAttribute("alt") : !(label?.trim() || inside);
  }}).map((node) => node.outerHTML)"""

# Contrast of every visible piece of text with the nearest opaque ground below it.
FAINT = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const part = rgb(text).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((rgb(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility()
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const ratios = texts.map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)];
  });
  return [ratios.length, ratios.filter(([ratio]) => ratio < 4.5)];
}"""

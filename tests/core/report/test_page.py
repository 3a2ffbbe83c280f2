"""The page is whole, escaped and self-contained."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ddray.errors import ConfigError
from ddray.report.chart import Curve
from ddray.report.page import Report, render_report
from ddray.report.pictures import Picture, to_uint8
from ddray.report.table import Column, Table
from tests.core.tiny import random_images as digits

EVIL = "<script>alert('x')</script> & \"quoted\""


def full_report(text: str = "text") -> Report:
    """A report with `text` in every place that takes one."""
    return Report(
        title=text,
        subtitle=text,
        headline=[(text, text, text)],
        pictures=[
            Picture(text, text, digits(4), 2, [text, "b"]),
            Picture("colour", text, digits(2, channels=3), 2, [text, "b"]),
            Picture("large", text, digits(1, channels=3, size=65), 1),
        ],
        tables=[Table(text, [Column("a", text, text)], [{"a": text}], text, text)],
        protocol=[text],
        meaning=text,
        curves=[Curve(text, [0, 1], [2, 1])],
        x_label=text,
        y_label=text,
        commands=[text],
        settings={text: {text: text, "nested": {"lr": 0.1, "betas": [0.9, 0.95]}}},
        versions={text: text},
    )


class Page(HTMLParser):
    """Collects the tags of a page and refuses those that do not balance."""

    VOID = ("meta", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_is_balanced_and_complete():
    page = Page(render_report(full_report()))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    titles = ["Pictures", "Measurements", "Training", "Reproduce", "Settings"]
    assert all(title in page.words for title in titles)
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert "nested.betas" in page.words


def test_page_loads_nothing_and_runs_nothing():
    text = render_report(full_report())
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    links = [attrs.get(key) for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert sum(str(link).startswith("data:") for link in links) == 4
    assert all(str(link).startswith(("data:", "#")) for link in links)


def test_every_text_is_escaped():
    text = render_report(full_report(EVIL))
    assert "<script" not in text
    page = Page(text)
    assert page.words.count(EVIL) >= 20
    (drawing,) = page.all("svg")
    assert str(drawing["aria-label"]).startswith(EVIL)


def test_pictures_are_whole_pngs_with_transparent_gaps():
    images = digits(3)
    attrs = Page(render_report(Report("t", pictures=[Picture("p", "", images, 2)]))).all("img")[0]
    data = base64.b64decode(str(attrs["src"]).removeprefix("data:image/png;base64,"))
    picture = Image.open(io.BytesIO(data))
    assert [str(size) for size in picture.size] == [attrs["width"], attrs["height"]]
    levels, alpha = (np.asarray(band) for band in picture.split())
    assert (alpha == 255).sum() == images.size
    assert np.array_equal(levels[1:9, 1:9], to_uint8(images)[0])
    assert attrs["class"] == "pixels ink"
    assert attrs["alt"] == "p: 3 images in 2 columns"


def test_neighbouring_pictures_share_their_headings():
    labels = ["zero", "one"]
    pictures = [Picture(name, "", digits(2), 2, labels) for name in "abc"]
    assert len(re.findall('class="heads"', render_report(Report("t", pictures=pictures)))) == 1
    with pytest.raises(ConfigError, match="2 column labels for 3 columns"):
        render_report(Report("t", pictures=[Picture("a", "", digits(3), 3, labels)]))


def test_the_highlighted_row_is_marked():
    table = Table(
        "Quality", [Column("a", "A")], [{"a": "Teacher"}, {"a": "x"}], highlight="Teacher"
    )
    assert render_report(Report("t", tables=[table])).count('<tr class="strong">') == 1


def test_an_empty_report_has_no_empty_sections():
    page = Page(render_report(Report("Only a title")))
    assert not page.all("h2")
    assert "Only a title" in page.words

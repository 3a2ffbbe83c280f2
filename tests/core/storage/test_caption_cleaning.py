"""Facts about LlamaGen's cleaning: of sentences, of shops' titles, of hostile text."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ddray.storage.caption_cleaning import clean_llamagen, unescaped
from ddray.storage.caption_file import clean_caption

# What stands on the right was worked out by hand from the rules.
CLEANED = {
    # Sentences stay, in lower case.
    "A photo of a Red Cat, sitting on a roof.": "a photo of a red cat, sitting on a roof.",
    "Two dogs - one black, one white - run": "two dogs - one black, one white - run",
    "it\u2019s \u201cfine\u201d": 'it\'s "fine"',
    "Ein Hund l\u00e4uft": "ein hund l\u00e4uft",
    "at 10:30 in the evening": "at 10:30 in the evening",
    # Markup, escapes, addresses.
    "<p>a <b>bold</b> cat<br/></p>": "a bold cat",
    "a<script>var x = 1</script> cat<!-- not this -->": "a cat",
    "cat &amp; dog &copy; &#252;ber &mdash; &unknown; end": "cat dog über - unknown end",
    "a%20red+cat": "a red cat",
    "see https://www.example.com/cats/1 for a cat": "see for a cat",
    "cats.org has a cat": "has a cat",
    "mail me@example.com now": "mail me now",
    "photo by @somebody of a cat": "photo by of a cat",
    "a <person> on a bike": "a person on a bike",
    "host 192.168.0.1 is a cat": "host is a cat",
    # Debris of product pages.
    "*** SALE *** (cat)": "sale cat",
    "T-Shirt jc6640 and jc6640vc and 6640vc231": "t-shirt and and",
    "cat #123 #12345 1234567": "cat",
    "poster 10x15 or 10.5\u00d715 or 10\u044515": "poster or or",
    "cat picture.jpg": "cat",
    "a cat jpg image": "a cat",
    "free shipping cat worldwide free shipping": "cat",
    "cat free download": "cat",
    "click for more cats": "cats",
    "cats page 3": "cats",
    "this-is-my-cute-cat": "this is my cute cat",
    "my-cute-cat": "my-cute-cat",
    "one\\ntwo": "one two",
    "wait......what": "wait what",
    "cat : dog": "cat: dog",
    "cat,dog": "cat, dog",
    '"""SOLD OUT"""': "sold out",
    "'quoted'": "quoted",
    "- a cat": "a cat",
    "\u732b a cat \u30ab": "a cat \u30ab",
    "a \u2014\u2014 b \u2212 c": "a - b \u2212 c",
    # Letters that are one in disguise.
    "\uff21\uff22\uff23 \ufb01sh": "abc fish",
    "cafe\u0301": "café",
    "bell\x07, mark\ufeff": "bell, mark",
    "quote\x93s": 'quote"s',
    # Nothing but debris.
    "IMG_1234.jpg": "",
    "https://example.com": "",
    "": "",
    " \n ": "",
}


@pytest.mark.parametrize(("given", "cleaned"), CLEANED.items())
def test_captions_become_what_the_rules_say(given: str, cleaned: str) -> None:
    assert clean_llamagen(given) == cleaned


@pytest.mark.parametrize("cleaned", CLEANED.values())
def test_what_the_encoder_does_itself_changes_nothing_more(cleaned: str) -> None:
    assert clean_caption(cleaned) == cleaned


def test_the_rules_are_applied_twice() -> None:
    # Once, and an escaped letter were large, and one sign alone were gone from the beginning.
    assert clean_llamagen("&#65; cat") == "a cat"
    assert clean_llamagen(":;cat") == "cat"
    # A wrong encoding is not mended; docs say so.
    assert clean_llamagen("cafÃ©") == "cafã"


@pytest.mark.parametrize(
    ("given", "cleaned"),
    {
        # A tag without an end is text, whatever version of Python reads it.
        "a cat <b and <!-- a dog": "a cat <b and <!- a dog",
        "<b>a cat</b> <i and &amp;lt;": "a cat <i and lt;",
        "a . . cat  .  dog": "a cat dog",
        "see x.y.org/a_b-c/ and a.com@b.org": "see and a. com",
        "10.x15.5, 7x8.": ".",
        "a1a22_ a1a22b3": "a1a22",
    }.items(),
)
def test_what_the_rules_for_debris_leave(given: str, cleaned: str) -> None:
    assert clean_llamagen(given) == cleaned


HOSTILE = {
    "one long word": "x" * 10_000,
    "sentences": "a red cat on a roof. " * 500,
    "quotes": "\"'" * 5000,
    "open tags": "<" * 10_000,
    "odd declarations": "<![foo[ a cat",
    "ampersands": "&" * 3000,
    "right to left": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621",
    "joined people": "\U0001f468\u200d\U0001f469",
    "escapes": "%" * 2000 + "%ff%fe",
}


@pytest.mark.parametrize("caption", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_end(caption: str) -> None:
    cleaned = clean_llamagen(caption)
    assert len(cleaned) <= len(caption)
    cleaned.encode()


# Each of them cost its length squared, or cubed.
LONG = {
    "open tags": lambda length: "<a " * (length // 3),
    "open quotes": lambda length: "<a b=\"'" * (length // 7),
    "hosts": lambda length: "a." * (length // 2),
    "spaces": lambda length: "a" + " " * length + "a",
    "digits": lambda length: "1" * length + "a",
    "sizes": lambda length: "1" * (length // 2) + "x" + "1" * (length // 2) + "a",
    "codes": lambda length: "a1a" + "1" * length + "_",
}


def _seconds(caption: str) -> float:
    begin = time.process_time()
    clean_llamagen(caption)
    return time.process_time() - begin


@pytest.mark.parametrize("made", LONG.values(), ids=LONG)
def test_the_time_grows_as_the_caption_does(made: Callable[[int], str]) -> None:
    short = min(_seconds(made(500)) for _ in range(3))
    assert _seconds(made(4000)) < 24 * short + 0.001  # of 8 times the length; its square is 64


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("salt &amp; pepper", "salt & pepper"),
        ("&#65;&#x42;&#67", "ABC"),
        (f"&#{'0' * 5000}65;", "A"),
        (f"a&#{'1' * 5000};b", "a\ufffdb"),
        (f"a&#{'9' * 8} b", "a\ufffd b"),
        (f"&#x{'f' * 5000};", "\ufffd"),
    ],
)
def test_references_are_read_however_long_their_numbers_are(given: str, read: str) -> None:
    assert unescaped(given) == read
    assert clean_caption(given) == read.lower()
    clean_llamagen(given)

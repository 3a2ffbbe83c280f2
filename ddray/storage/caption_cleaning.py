"""What captions went through before LlamaGen's T5: rules for the debris of product pages.

The published text models were trained, and are judged, on captions that had been through them
twice (language/t5.py, after DeepFloyd's and PixArt's). A sentence that somebody wrote leaves them
nearly as it was; the title of a shop's page does not. Behind `--clean llamagen`.

One of their steps is not done here: text that was read in a wrong encoding, as "cafÃ©", is left so.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

# No name of a host is longer; without an end it would be tried from each of its letters.
_HOST = r"[a-zA-Z0-9.-]{1,253}\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_SIGNS = re.escape("#®•©™&@·º½¾¿¡§~()[]{}|\\/*")

_LEADING_ZEROS = re.compile(r"&#0+(?=[0-9])")
_NO_CHARACTER = re.compile(r"&#[0-9]{8,};?")

# In this order: what one removes is what the next one meets.
_ADDRESSES = (
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
)
_BEFORE_MENDING = (
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # strokes, signs and ideographs of Chinese, Japanese and Korean
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),  # a line break as two letters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    # Names of files; from the first letter of a word, or it would be tried from each.
    (rf"(?<!\S)\S+\.{_FILE_TYPE}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{_SIGNS}]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),  # from the first of several spaces, or it would be tried from each
)
_AFTER_MENDING = (
    # Codes of articles: jc6640, jc6640vc, 6640vc231.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # What shops say.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_TYPE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    ("\\b\\d+(?:\\.\\d*)?[x\u0445\u00d7]\\d+(?:\\.\\d*)?\\b", ""),  # sizes: 10x15
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # What is left at the ends; a space there keeps it.
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINT = re.compile("[-_]")
_JOINTS_OF_A_SENTENCE = 3


# Of text that was read in a wrong encoding, what can be told from single characters.
_WINDOWS = {n: bytes([n]).decode("cp1252", errors="ignore") or chr(n) for n in range(0x80, 0xA0)}
_LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"
_WIDE = map(chr, (0x3000, *range(0xFF01, 0xFFF0)))
_MENDED: dict[int, str | None] = {
    **{ord(sign): unicodedata.normalize("NFKC", sign) for sign in (*_LIGATURES, *_WIDE)},
    0xFB05: "\u017ft",
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    # Controls, but for what ends a line.
    **dict.fromkeys((*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF)),
    **dict.fromkeys((*range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD))),
    **dict.fromkeys((*range(0x1D173, 0x1D17B), *range(0xE0000, 0xE0080))),
}


def unescaped(text: str) -> str:
    """Text in which references to characters, as `&amp;`, are the characters they stand for."""
    # A number of thousands of digits Python does not read (CVE-2020-10735); beyond the last
    # character all stand for the same.
    text = _LEADING_ZEROS.sub("&#", text)
    return html.unescape(_NO_CHARACTER.sub("\ufffd", text))


def clean_llamagen(caption: str) -> str:
    """A caption as LlamaGen's T5 got it; empty where nothing but debris was in it."""
    return _once(_once(caption))


def _once(caption: str) -> str:
    text = unquote_plus(caption).strip().lower().replace("<person>", "person")
    text = _ruled(_without_markup(_ruled(text, _ADDRESSES)), _BEFORE_MENDING)
    # this-is-my-cute-cat
    if len(_JOINT.findall(text)) > _JOINTS_OF_A_SENTENCE:
        text = _JOINT.sub(" ", text)
    text = unicodedata.normalize("NFC", text.translate(_WINDOWS).translate(_MENDED))
    text = unescaped(unescaped(text)).strip()
    return _ruled(text, _AFTER_MENDING).strip()


def _ruled(text: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_markup(text: str) -> str:
    """The text of a page, without what browsers do not show of it."""
    page = _Page()
    # Behind the last end of a tag all is text; Python's parser would look for one from every "<".
    behind = text.rfind(">") + 1
    try:
        page.feed(text[:behind] + text[behind:].replace("<", "&lt;"))
        page.close()
    except AssertionError:  # what Python's parser has for a declaration that it does not know
        return text
    return "".join(page.texts)


class _Page(HTMLParser):
    """Gathers the texts between tags."""

    _UNSEEN = frozenset({"script", "style", "template"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unseen += tag in self._UNSEEN

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= bool(self._unseen) and tag in self._UNSEEN

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.texts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name: str) -> None:
        self.handle_data(unescaped(f"&#{name};"))

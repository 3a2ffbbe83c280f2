"""Facts about rows of captions: which of several is drawn, what is left out, hostile texts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddray.errors import ConfigError
from ddray.storage.caption_cleaning import clean_llamagen
from ddray.storage.caption_file import CaptionFile, CaptionRow
from ddray.storage.caption_row import drawn

LENGTH, WIDTH = 4, 2
GOOD = [[1.0, 2.0], [3.0, 4.0]]


def opened(path: Path, **other: Any) -> CaptionFile:
    return CaptionFile(str(path), length=LENGTH, width=WIDTH, **other)


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines of rows, and of texts as they are; Parquet of rows."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
    return path


def kept(file: CaptionFile, count: int) -> list[CaptionRow]:
    rows = [*file.rows(count)]
    assert [row.index for row in rows] == [*range(count)]
    return rows


# Several captions of a row.


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_one_of_several_captions_is_drawn_by_seed_and_index(name: str, tmp_path: Path) -> None:
    texts = [[f"{i} {k}" for k in range(5)] for i in range(200)]
    path = write(tmp_path / name, [{"caption": several} for several in texts])
    rows = kept(opened(path, seed=3), 200)
    for i, row in enumerate(rows):
        digest = hashlib.sha256(f"ddray caption 3 {i}".encode()).digest()
        assert row.caption == f"{i} {int.from_bytes(digest[:8], 'big') % 5}"
    assert [row.caption for row in kept(opened(path, seed=3), 90)] == [
        row.caption for row in rows[:90]
    ]
    others = [row.caption for row in kept(opened(path, seed=4), 200)]
    assert 120 < sum(a != b.caption for a, b in zip(others, rows, strict=True)) < 190
    if name == "a.jsonl":
        assert json.loads(rows[7].record or "")["prompt"] == rows[7].caption


def test_each_of_several_captions_is_drawn_as_often() -> None:
    often = Counter(drawn("abcde", 0, index) for index in range(5000))
    assert sum((count - 1000) ** 2 / 1000 for count in often.values()) < 13.3  # 1 %, 4 degrees
    assert drawn(["one"], 5, 7) == "one"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_index_beside_several_captions_is_looked_at(name: str, tmp_path: Path) -> None:
    rows = [{"index": i, "caption": ["a", "b"]} for i in (0, 1, 3)]
    file = opened(write(tmp_path / name, rows))
    assert [row.caption for row in kept(file, 2)] == [drawn("ab", 0, i) for i in range(2)]
    with pytest.raises(ConfigError, match="index 2 is missing"):
        file.check(3)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_place_in_the_lists_can_be_named(name: str, tmp_path: Path) -> None:
    rows = [{"text": [f"{i} {k}" for k in range(3)], "id": i} for i in range(4)]
    path = write(tmp_path / name, rows)
    found = kept(opened(path, column="text[2]"), 4)
    assert [row.caption for row in found] == [f"{i} 2" for i in range(4)]


def test_images_of_one_prompt_share_the_caption_that_was_drawn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": ["a", "b", "c"]} for _ in range(30)])
    captions = [row.caption for row in kept(opened(path, each=4), 120)]
    assert all(len({*captions[i : i + 4]}) == 1 for i in range(0, 120, 4))
    assert {*captions} == {"a", "b", "c"}


# Broken rows.


BROKEN_LINES: list[tuple[Any, str]] = [
    ({"caption": None}, "row 1 has no text in 'caption', but null"),
    ({"caption": 5}, "row 1 has no text in 'caption', but 5"),
    ({"caption": {"a": "b" * 90}}, r"row 1 has no text in 'caption', but {\"a\": \"bbb.* ...$"),
    ({"caption": []}, "row 1 has no text in 'caption', but null"),
    ({"caption": [None]}, "row 1 has no text in 'caption', but null"),
    ({"text": "a"}, "row 1 has no text in 'caption', but null"),
    ({"caption": ""}, "the caption of row 1 is empty"),
    ({"caption": " \n\t\u00a0\u3000"}, "the caption of row 1 is empty"),
    ({"caption": "<br><br/>"}, "the caption of row 1 is empty"),
    ({"caption": "cut \ud83d"}, "the caption of row 1 holds half a surrogate pair"),
    ({"caption": ["cut \ud83d"]}, "the caption of row 1 holds half a surrogate pair"),
    ({"caption": "a\0b"}, "the caption of row 1 holds a NUL character"),
    ([1], "line 2 is no object"),
    ('{"caption": "cut', "line 2 is not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_a_broken_row_is_named_or_left_out_and_counted(
    line: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"caption": "one"}, line, {"caption": "three"}])
    file = opened(path)
    with pytest.raises(ConfigError, match=f"captions {path}: {message}") as refusal:
        file.check(3)
    assert "\n" not in str(refusal.value)
    file = opened(path, skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["one", "three"]
    assert file.left_out.count == 1
    with pytest.raises(ConfigError, match=r"2 rows \(1 left out: .*\), but count=3"):
        file.check(3)
    assert file.left_out.count == 1  # of the last pass


FEATURES: list[tuple[Any, str]] = [
    (None, "are no T lists of D numbers"),
    ([[1.0, 2.0, 3.0]], "are 1 x 3; the teacher takes 1 to 4 positions of width 2"),
    ([[1.0, 2.0]] * 5, "are 5 x 2"),
    ([[1.0, float("nan")]], "are not all finite"),
    ([[1.0, float("inf")]], "are not all finite"),
    ([[1.0, 2.0], [1.0]], "are no T lists of D numbers"),
    ([[1.0, None]], "are no T lists of D numbers"),
]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_broken_features_are_left_out_and_the_others_keep_theirs(name: str, tmp_path: Path) -> None:
    features = [GOOD, *(given for given, _ in FEATURES), [[5.0, 6.0]]]
    path = write(
        tmp_path / name,
        [{"index": i, "caption": str(i), "features": given} for i, given in enumerate(features)],
    )
    for i, (_, message) in enumerate(FEATURES, start=1):
        part = write(tmp_path / f"part-{name}", _first_is_good(features[i]))
        with pytest.raises(ConfigError, match=f"the features of index 1 {message}"):
            [*opened(part).rows(2)]
    file = opened(path, skip_bad=True)
    first, last = kept(file, 2)
    assert (first.caption, last.caption) == ("0", str(len(features) - 1))
    np.testing.assert_array_equal(np.asarray(first.features_TD), GOOD)
    np.testing.assert_array_equal(np.asarray(last.features_TD), [[5.0, 6.0]])
    assert file.left_out.count == len(FEATURES)
    assert str(file.left_out) == (
        "7 left out: the features of index 1 are no T lists of D numbers; the features of index 2 "
        "are 1 x 3; the teacher takes 1 to 4 positions of width 2; the features of index 3 are 5 x "
        "2; the teacher takes 1 to 4 positions of width 2; and 4 more"
    )


def _first_is_good(features: Any) -> list[dict[str, Any]]:
    given = (GOOD, features)
    return [{"index": i, "caption": "a", "features": f} for i, f in enumerate(given)]


def test_parquet_is_read_on_behind_its_broken_rows(tmp_path: Path) -> None:
    texts = pa.array([b"one", None, b"a \xed\xa0\xbd", b"", b"five", b"six"]).view(pa.string())
    pq.write_table(pa.table({"index": range(6), "caption": texts}), tmp_path / "a.parquet")
    file = opened(tmp_path / "a.parquet", skip_bad=True)
    assert [row.caption for row in kept(file, 3)] == ["one", "five", "six"]
    assert [fault[:38] for fault in file.left_out.first] == [
        "index 1 has no text in 'caption', but ",
        "the caption of index 2 is no UTF-8 ('u",
        "the caption of index 3 is empty",
    ]
    nulls = {"index": [0, None, 2], "caption": ["one", "two", "three"]}
    pq.write_table(pa.table(nulls), tmp_path / "b.parquet")
    file = opened(tmp_path / "b.parquet", skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["one", "three"]
    assert file.left_out.first == ["row 1 has no index"]


def test_short_rows_of_tables_and_lines_without_a_key_are_broken_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("id\tPrompt\n1\tone\n2\n3\tthree\n")
    file = opened(tmp_path / "a.tsv", skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["one", "three"]
    assert file.left_out.first == ["row 1 has 1 of 2 columns"]
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    file = opened(tmp_path / "a.txt", skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["one", "three"]
    rows: list[Any] = [{"index": i, "caption": str(i)} for i in range(5)]
    rows[1], rows[2], rows[3] = {"index": "1", "caption": "a"}, {"index": 2}, {"index": 3}
    rows[3] |= {"caption": "3", "features": GOOD}
    file = opened(write(tmp_path / "a.jsonl", rows), skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["0", "4"]
    assert file.left_out.first == [
        "index '1' is no integer",
        "line 3 is no object with index and caption",
        "features must be in every line or in none; see index 3",
    ]


def test_an_order_that_is_broken_is_nobodys_row(tmp_path: Path) -> None:
    rows = [{"index": i, "caption": "a"} for i in (0, 1, 3)]
    with pytest.raises(ConfigError, match="index 2 is missing: row 2 has index 3"):
        opened(write(tmp_path / "a.jsonl", rows), skip_bad=True).check(3)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        opened(write(tmp_path / "b.jsonl", ["no", *map(json.dumps, rows)]), skip_bad=True)


def test_broken_rows_of_shards_are_named_with_their_file(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"prompt": name}, {"prompt": ""}])
    file = opened(tmp_path, skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["a", "b"]
    assert file.left_out.first == [f"{tmp_path}/a.jsonl: the caption of row 1 is empty"]
    with pytest.raises(ConfigError, match=r"2 rows \(2 left out: .*a.jsonl: .*; .*b.jsonl: "):
        file.check(3)


# Hostile texts.


HOSTILE = {
    "long": "a very long cat, " * 600,
    "one long word": "x" * 10_000,
    "right to left": "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 \u05d7\u05ea\u05d5\u05dc",
    "marks of direction": "\u202eevil\u202c \u2066cat\u2069 \u200f",
    "joined people": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "marks on marks": "Z\u0351\u036b\u0343" * 200,
    "no normal form": "cafe\u0301 \u212b \ufb01ne",
    "line breaks": "one\u2028two\u0085three\r\nfour",
    "quotes": '\'; DROP TABLE "captions" --\\"',
    "controls": "bell\x07 escape\x1b[31m",
    "no characters": "\ufffe\uffff\U0010ffff",
    "private": "\ue000\U000f0000",
}


@pytest.mark.parametrize("caption", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_texts_that_are_merely_strange_come_back_as_they_are(
    name: str, caption: str, tmp_path: Path
) -> None:
    if name == "a.csv":
        quoted = caption.replace('"', '""')
        (tmp_path / name).write_text(f'caption\n"{quoted}"\n', encoding="utf-8", newline="")
    else:
        write(tmp_path / name, [{"caption": caption}])
    (row,) = kept(opened(tmp_path / name), 1)
    assert row.caption == caption


@pytest.mark.parametrize("caption", ["\u200b", "\u200b\u200d\ufeff\u2060", "\u202e\u202c"])
def test_a_caption_that_nobody_sees_is_empty(caption: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"caption": caption}])
    with pytest.raises(ConfigError, match="the caption of row 0 is empty"):
        opened(path).check(1)


# Cleaning.


def test_captions_are_cleaned_before_they_are_judged(tmp_path: Path) -> None:
    texts = ["<b>A Red Cat</b> IMG_1234.jpg", "cat.png", "FREE shipping", "Two"]
    path = write(tmp_path / "a.jsonl", [{"caption": text} for text in texts])
    with pytest.raises(ConfigError, match="the caption of row 1 is empty"):
        opened(path, clean=clean_llamagen).check(4)
    file = opened(path, clean=clean_llamagen, skip_bad=True)
    assert [row.caption for row in kept(file, 2)] == ["a red cat", "two"]
    assert json.loads(kept(file, 1)[0].record or "") == {
        "caption": texts[0],
        "prompt": "a red cat",
    }

"""Facts about files of prompts: rows in the order of the file, and what is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddray.errors import ConfigError
from ddray.storage.caption_file import CaptionFile

TEXTS = ["a red cat", 'a "cat", on\ta roof', "zwölf"]
TABLES = {
    "a.tsv": 'Prompt\tCategory\na red cat\tA\n"a ""cat"", on\ta roof"\tB\nzwölf\tC\n',
    # COCO's captions are called so, and divided by tabs.
    "a.csv": 'id\tPrompt\n1\ta red cat\n2\t"a ""cat"", on\ta roof"\n3\tzwölf\n',
    "b.csv": 'id,caption\r\n1,a red cat\r\n2,"a ""cat"", on\ta roof"\r\n3,zwölf\r\n',
    "a.txt": "\ufeffa red cat\n" + 'a "cat", on\ta roof\r\n' + "zwölf\n\n \n",
    "a.jsonl": "".join(json.dumps({"tag": "x", "prompt": text}) + "\n" for text in TEXTS),
}


def opened(path: Path, **other: Any) -> CaptionFile:
    return CaptionFile(str(path), length=4, width=8, **other)


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_those_of_the_file_in_its_order(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLES[name], newline="")
    file = opened(tmp_path / name)
    rows = [*file.rows(3)]
    assert [(row.index, row.caption) for row in rows] == [*enumerate(TEXTS)]
    assert not file.has_features and rows[0].features_TD is None
    assert all(json.loads(row.record or "")["prompt"] == row.caption for row in rows)
    assert [row.caption for row in file.rows(2)] == TEXTS[:2]
    with pytest.raises(ConfigError, match=r"captions .*: 3 rows, but count=4"):
        file.check(4)


def test_each_prompt_may_stand_for_several_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(TABLES["a.jsonl"])
    file = opened(tmp_path / "a.jsonl", each=2)
    rows = [*file.rows(6)]
    assert [row.index for row in rows] == [*range(6)]
    assert [row.caption for row in rows] == [text for text in TEXTS for _ in range(2)]
    assert json.loads(rows[3].record or "") == {"tag": "x", "prompt": TEXTS[1]}
    with pytest.raises(ConfigError, match="3 rows of 2 images each, but count=8"):
        file.check(8)


def test_the_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tprompt\none\ttwo\n")
    assert [row.caption for row in opened(tmp_path / "a.tsv").rows(1)] == ["two"]
    named = opened(tmp_path / "a.tsv", column="text")
    assert [row.caption for row in named.rows(1)] == ["one"]
    (tmp_path / "a.jsonl").write_text('{"index": 7, "text": "one", "features": [[1]]}\n')
    (row,) = opened(tmp_path / "a.jsonl", column="text").rows(1)
    assert (row.index, row.caption) == (0, "one")
    assert json.loads(row.record or "") == {"index": 7, "text": "one", "prompt": "one"}


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n", None, "no column caption, .* it has a, b: name .* --caption-col"),
        ("a.tsv", "a\tb\n1\t2\n", "c", "there is no column 'c'; it has a, b"),
        ("a.tsv", "b\ta\n1\t2\n3\n", "a", "row 1 has 1 of 2 columns"),
        ("a.csv", "", None, "no column caption"),
        ("a.txt", "a\n", "b", "caption_column='b', but a .txt has no columns"),
        ("a.txt", "a\n\nb\n", None, "the caption of row 1 is empty"),
        ("a.jsonl", '{"text": "a"}\n', None, "it has text: name the one"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": 5}\n',
            None,
            "row 1 has no text in 'prompt', but 5",
        ),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', None, "line 2 is no object"),
    ],
)
def test_what_cannot_be_read_is_refused(
    name: str, text: str, column: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / name, column=column).check(2)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"\xef\xbb\xbfone\n\xe9t\xe9 \xff\ntwo \xc3\xa9\n\xed\xa0\x80\nthree\n"),
        ("a.csv", b'n,Prompt\n1,one\n2,\xe9t\xe9\n3,"two \xc3\xa9"\n\xff,five\n4,three\n'),
        ("a.tsv", b'Prompt\tn\none\t1\n"\xe9t\xe9\nlait"\t2\ntwo \xc3\xa9\t3\nx\t\xff\nthree\t4'),
    ],
)
def test_bytes_that_are_no_text_break_their_row_alone(
    name: str, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"captions .*{name}: row 1 is no UTF-8: byte 0xe9$"):
        opened(tmp_path / name).check(2)
    file = opened(tmp_path / name, skip_bad=True)
    assert [row.caption for row in file.rows(3)] == ["one", "two é", "three"]
    assert str(file.left_out).startswith("2 left out: row 1 is no UTF-8: byte 0xe9; row 3 is no")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_header_that_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("prompt\nred cat\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"captions .*: its first line is no UTF-8: byte 0xff"):
        opened(tmp_path / name, skip_bad=True)

"""Facts about captions in Parquet that people have: LAION's, img2dataset's, and others by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddray.errors import ConfigError
from ddray.storage.caption_file import CaptionFile

TEXTS = ["a red cat", "a cat, on\ta roof", "zwölf", "four"]


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def opened(path: Path, **other: Any) -> CaptionFile:
    return CaptionFile(str(path), length=4, width=8, **other)


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"URL": ["x"] * 4, "TEXT": TEXTS}, None),
        ({"url": ["x"] * 4, "caption": TEXTS, "key": list("abcd")}, None),
        ({"prompt": TEXTS}, None),
        ({"TEXT": ["x"] * 4, "Caption": TEXTS}, None),
        ({"caption": ["x"] * 4, "long": TEXTS}, "long"),
        # Whoever names a column has a file of prompts, whatever its index says of it.
        ({"index": [7, 7, 3, 0], "caption": TEXTS}, "caption"),
        ({"a.b": pa.array(TEXTS, pa.large_string())}, "a.b"),
    ],
)
def test_rows_without_an_index_are_numbered(
    columns: dict[str, Any], column: str | None, tmp_path: Path
) -> None:
    file = opened(write(tmp_path / "a.parquet", columns), column=column)
    assert [(row.index, row.caption) for row in file.rows(4)] == [*enumerate(TEXTS)]
    assert not file.has_features
    with pytest.raises(ConfigError, match=r"a.parquet: 4 rows, but count=5"):
        file.check(5)


def test_of_img2dataset_the_rows_that_have_an_image_count(tmp_path: Path) -> None:
    status = ["success", "failed_to_download", "success", None] * 40
    captions = [f"cat {i}" if i % 4 != 1 else None for i in range(160)]
    path = write(tmp_path / "00000.parquet", {"caption": captions, "status": status})
    rows = [*opened(path).rows(80)]
    assert [row.index for row in rows] == [*range(80)]
    assert [row.caption for row in rows] == [f"cat {i}" for i in range(0, 160, 2)]
    with pytest.raises(ConfigError, match="80 rows of status success, but count=81"):
        opened(path).check(81)
    # A number is somebody else's status, and ours has none.
    path = write(tmp_path / "a.parquet", {"caption": TEXTS, "status": [200, 404, 200, 0]})
    assert [row.caption for row in opened(path).rows(4)] == TEXTS
    path = write(
        tmp_path / "b.parquet", {"index": range(4), "caption": TEXTS, "status": ["failed"] * 4}
    )
    assert [row.caption for row in opened(path).rows(4)] == TEXTS


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"text": TEXTS}, None, "no column caption, .*, TEXT; it has text: name .* --caption-col"),
        ({"text": TEXTS}, "b", "there is no column 'b'; it has text"),
        ({"text": TEXTS}, "b[0]", r"there is no column 'b\[0\]'; it has text"),
        ({"caption": [1, 2]}, None, "column 'caption' is int64; strings, or lists of them, are"),
        ({"caption": [[1], [2]]}, None, "column 'caption' is list<.*>; strings, or lists of them"),
        ({"caption": ["a", None]}, None, "row 1 has no text in 'caption', but null"),
        ({"caption": ["a", " "]}, None, "the caption of row 1 is empty"),
        ({"caption": [["a"], []]}, None, "row 1 has no text in 'caption', but null"),
        ({"caption": [["a"], [None]]}, None, "row 1 has no text in 'caption', but null"),
        ({"text": [["a", "b"], ["c"]]}, "text[1]", r"row 1 has no text in 'text\[1\]', but null"),
        ({"text": ["a", "b"]}, "text[0]", r"row 0 has no text in 'text\[0\]', but null"),
    ],
)
def test_what_cannot_be_read_is_refused(
    columns: dict[str, Any], column: str | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError, match=f"captions {path}: .*{message}") as refusal:
        opened(path, column=column).check(2)
    assert "\n" not in str(refusal.value)


def test_lists_of_which_one_is_no_utf_8_are_refused_by_their_row(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"b", b"\xed\xa0\xbd"]).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), broken)
    path = write(tmp_path / "a.parquet", {"caption": lists})
    opened(path).check(2)
    with pytest.raises(ConfigError, match="the caption of row 2 is no UTF-8"):
        opened(path).check(3)

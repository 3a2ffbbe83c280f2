"""Facts about captions: what a file of them must be, and the one file that each shard gets."""

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError, ShardError, StorageError
from ddray.sets.captions import captions_name, cut_captions, left_out, padded, read_captions
from ddray.sets.conditions import (
    check_encoder,
    encoder_name,
    open_captions,
    read_conditions,
)
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.base import Storage
from ddray.storage.caption_file import CaptionFile, CaptionRow
from ddray.storage.caption_row import drawn
from ddray.storage.local import LocalStorage
from tests.core.sets.trajectories.test_trajectory_set import plan_of
from tests.core.tiny import tiny_teacher
from tests.s3_server import BUCKET

LENGTH, WIDTH = 5, 3
Row = dict[str, Any]


def rows_of(count: int, features: bool = True) -> list[Row]:
    """Rows that belong to the index alone; row i has 1 + i mod LENGTH positions."""
    rows: list[Row] = [{"index": i, "caption": f"a cat, {i} öre"} for i in range(count)]
    for i, row in enumerate(rows):
        values = np.random.default_rng(i).normal(size=(1 + i % LENGTH, WIDTH))
        row |= {"features": values.astype(np.float32).tolist()} if features else {}
    return rows


def write(path: Path, rows: list[Row]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(uri: str) -> CaptionFile:
    return CaptionFile(uri, length=LENGTH, width=WIDTH)


@pytest.fixture(params=["captions.parquet", "captions.jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def assert_same(read: CaptionRow, row: Row) -> None:
    assert (read.index, read.caption) == (row["index"], row["caption"])
    assert read.features_TD is not None
    assert read.features_TD.dtype == np.float32
    np.testing.assert_array_equal(read.features_TD, np.array(row["features"], np.float32))


# The file.


def test_rows_come_back_as_written_and_more_than_the_count_are_left_alone(path: Path) -> None:
    rows = rows_of(150)
    file = opened(write(path, [*rows, {"index": 7, "caption": "", "features": [[0.5]]}]))
    assert file.has_features
    for read, row in zip(file.rows(150), rows, strict=True):
        assert_same(read, row)
    assert [row.features_TD for row in file.rows(20, features=False)] == [None] * 20


def test_features_are_optional_and_other_columns_are_nobodys_business(path: Path) -> None:
    rows = [{**row, "url": "x"} for row in rows_of(9, features=False)]
    file = opened(write(path, rows))
    assert not file.has_features
    assert [row.caption for row in file.rows(9)] == [row["caption"] for row in rows]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float16())),
        pa.large_list(pa.large_list(pa.float64())),
        pa.list_(pa.list_(pa.float32(), WIDTH)),
        pa.list_(pa.list_(pa.float32(), WIDTH), 2),
    ],
)
def test_every_float_and_every_list_of_arrow_will_do(kind: Any, tmp_path: Path) -> None:
    features = [[[0.5, 1.0, -2.0], [i, 0.0, 0.25]] for i in range(70)]
    columns = {"index": pa.array(range(70)), "caption": pa.array(["a"] * 70, pa.large_string())}
    half = np.array(features, np.float16)
    given = half.reshape(70, -1) if kind.value_type.value_type == pa.float16() else features
    if kind.value_type.value_type == pa.float16():
        values = pa.ListArray.from_arrays(np.arange(0, 421, 3, dtype=np.int32), given.reshape(-1))
        columns["features"] = pa.ListArray.from_arrays(np.arange(0, 141, 2, dtype=np.int32), values)
    else:
        columns["features"] = pa.array(features, kind)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = list(opened(str(tmp_path / "a.parquet")).rows(70))
    np.testing.assert_array_equal([row.features_TD for row in rows], np.array(features))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], "index 7 twice at row 8; rows must ascend by index from 0"),
        ([0, 1, 3], "index 2 is missing: row 2 has index 3; rows must ascend"),
        ([1, 2, 3], "index 0 is missing: row 0 has index 1"),
        ([0, 1, 2, 1, 4], "index 1 twice at row 3"),
        ([0, -1, 2], "index -1 at row 1; rows must ascend"),
        ([*range(70), 69], "index 69 twice at row 70"),
    ],
)
def test_rows_out_of_order_are_refused_by_index_and_row(
    order: list[int], message: str, path: Path
) -> None:
    file = opened(write(path, [{"index": i, "caption": "a"} for i in order]))
    with pytest.raises(ConfigError, match=re.escape(f"captions {path}: {message}")) as refusal:
        file.check(len(order))
    assert "\n" not in str(refusal.value)


def test_too_few_rows_are_refused_with_both_numbers(path: Path) -> None:
    file = opened(write(path, rows_of(7)))
    for count, number in ((8, 7), (1000, 7)):
        with pytest.raises(ConfigError, match=f"{number} rows, but count={count}"):
            file.check(count)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([[0.0] * 4], "the features of index 3 are 1 x 4; the teacher takes 1 to 5 positions of"),
        ([[0.0] * 3] * 6, "the features of index 3 are 6 x 3; .* 1 to 5 positions of width 3"),
        ([[0.0, 1.0, float("nan")]], "the features of index 3 are not all finite"),
        ([[0.0] * 3, [0.0] * 2], "the features of index 3 are no T lists of D numbers"),
        ([[0.0, 1.0, None]], "the features of index 3 are no T lists of D numbers"),
        ([None], "the features of index 3 are no T lists of D numbers"),
        ([], "the features of index 3 are (0 x 3|no T lists)"),
        (None, "the features of index 3 are no T lists"),
    ],
)
def test_features_that_the_teacher_cannot_take_are_refused(
    features: Any, message: str, path: Path
) -> None:
    rows = rows_of(5)
    rows[3]["features"] = features
    file = opened(write(path, rows))
    with pytest.raises(ConfigError, match=message):
        list(file.rows(len(rows)))


def test_a_caption_that_an_encoder_would_find_empty_is_refused(path: Path) -> None:
    rows = rows_of(3, features=False)
    rows[2]["caption"] = " <br> "
    with pytest.raises(ConfigError, match="the caption of index 2 is empty"):
        opened(write(path, rows)).check(3)
    # Who gives features may caption them as he likes.
    rows = rows_of(3)
    rows[2]["caption"] = ""
    opened(write(path, rows)).check(3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [0], "text": ["a"]}, "there is no column 'caption'; it has index, text"),
        ({"index": [0.0], "caption": ["a"]}, "column 'index' is double; integers are needed"),
        (
            {"index": [0], "caption": [5]},
            "column 'caption' is int64; strings, or lists of them, are needed",
        ),
        (
            {"index": [0], "caption": ["a"], "features": [[1.0]]},
            "column 'features' is list<.*>; lists of T lists of D floats are needed",
        ),
        ({"index": [0, None], "caption": ["a", "b"]}, "row 1 has no index"),
        ({"index": [0, 1], "caption": ["a", None]}, "index 1 has no text in 'caption', but null"),
    ],
)
def test_other_columns_of_parquet_are_refused(columns: Any, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        opened(str(tmp_path / "a.parquet")).check(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("\xff", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ('{"index": 1}', "line 2 is no object with index and caption"),
        ('{"index": "1", "caption": "a"}', "index '1' is no integer"),
        ('{"index": true, "caption": "a"}', "index True is no integer"),
        ('{"index": 1, "caption": 5}', "index 1 has no text in 'caption', but 5"),
        (
            '{"index": 1, "caption": "a", "features": [[1]]}',
            "in every line or in none; see index 1",
        ),
    ],
)
def test_other_lines_of_json_are_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"index": 0, "caption": "a"}\n' + line.encode("latin-1") + b"\n\n")
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        opened(str(path)).check(2)
    assert str(refusal.value).startswith(f"captions {path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a dog \ud83d", "holds half a surrogate pair"),
        ("\udc4d a dog", "holds half a surrogate pair"),
        ("\udc4d\ud83d", "holds half a surrogate pair"),
        ("a\0dog", "holds a NUL character"),
    ],
)
@pytest.mark.parametrize("features", [None, [[1.0] * 8]])
def test_a_caption_that_is_no_text_is_refused_by_its_index(
    caption: str, message: str, features: Any, tmp_path: Path
) -> None:
    rows = [{"index": i, "caption": text} for i, text in enumerate(["a cat", caption])]
    if features is not None:
        rows = [{**row, "features": features} for row in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=f"captions {path}: the caption of index 1 {message}"):
        opened(str(path)).check(2)
    if features is None:
        with pytest.raises(ConfigError, match="the caption of index 1"):
            cut_captions(opened(str(path)), LocalStorage(str(tmp_path / "set")), PLAN)


def test_a_caption_of_parquet_that_is_no_utf_8_is_refused_by_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a cat", "\U0001f44d".encode(), b"a \xed\xa0\xbd"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"index": [0, 1, 2], "caption": texts}), path)
    opened(str(path)).check(2)
    with pytest.raises(ConfigError, match=f"captions {path}: the caption of index 2 is no UTF-8"):
        opened(str(path)).check(3)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_marks_and_line_ends_of_windows_change_nothing(mark: bytes, tmp_path: Path) -> None:
    captions = ["a cat", "zw\u00f6lf \U0001f44d\U0001f3fd", "two\r\nlines"]
    lines = [
        json.dumps({"index": i, "caption": text}, ensure_ascii=i != 1).encode()
        for i, text in enumerate(captions)
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + b"\r\n".join(lines) + b"\r\n")
    assert [row.caption for row in opened(str(path)).rows(3)] == captions


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"index": 0, "caption": "zw\u00f6lf"}\n'.encode(encoding))
    with pytest.raises(ConfigError, match=f"captions {path}: line 1 is not JSON") as refusal:
        opened(str(path)).check(1)
    if encoding in ("utf-16", "utf-32"):  # with a mark
        assert f"text in {encoding.upper()}; save it as UTF-8" in str(refusal.value)


def test_what_is_no_file_of_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"captions='a.doc' must end in .parquet, .jsonl, .txt"):
        opened("a.doc")
    with pytest.raises(StorageError, match=r"cannot read captions .*a.parquet: no such file"):
        opened(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_text("index,caption")
    with pytest.raises(ConfigError, match=r"a.parquet is damaged or no Parquet"):
        opened(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot read captions .*a.jsonl: "):
        opened(str(tmp_path / "a.jsonl"))


def test_captions_lie_in_s3_too(path: Path, s3_endpoint: str) -> None:  # noqa: F811
    rows = rows_of(9)
    data = Path(write(path, rows)).read_bytes()
    open_storage(f"s3://{BUCKET}/some where").write(path.name, data)
    for read, row in zip(
        opened(f"s3://{BUCKET}/some where/{path.name}").rows(9), rows, strict=True
    ):
        assert_same(read, row)
    with pytest.raises(StorageError, match=r"cannot read captions s3://.*: "):
        opened(f"s3://{BUCKET}/nothing/{path.name}")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"index": i, "caption": "x" * 50_000} for i in range(300)])
    file = opened(str(tmp_path / "a.jsonl"))
    tracemalloc.start()
    try:
        file.check(300)
        assert tracemalloc.get_traced_memory()[1] < 4e6 < (tmp_path / "a.jsonl").stat().st_size / 3
    finally:
        tracemalloc.stop()


def test_captions_need_no_torch() -> None:
    code = "import sys, ddray.sets.captions; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The set.


PLAN = plan_of(conditioning="text", num_classes=0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(str(tmp_path / "set"))


def test_every_shard_gets_a_file_of_its_own_rows(path: Path, storage: Storage) -> None:
    rows = rows_of(30)
    assert cut_captions(opened(write(path, rows)), storage, PLAN) == 3
    assert [*storage.list()] == [captions_name(k) for k in range(3)]
    for k in range(3):
        part = [rows[i] for i in PLAN.shard_range(k)]
        read = read_captions(storage, k, len(part))
        assert [*read.captions] == [row["caption"] for row in part]
        assert read.features is not None
        for features_TD, row in zip(read.features, part, strict=True):
            np.testing.assert_array_equal(features_TD, np.array(row["features"], np.float32))
        frame = pd.read_parquet(Path(storage.uri) / captions_name(k))
        assert frame["index"].tolist() == [*PLAN.shard_range(k)]
        np.testing.assert_array_equal(np.stack(frame["features"][1]), read.features[1])


def test_a_cut_says_how_many_rows_were_left_out(
    path: Path, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(27)
    for broken in (rows[3], rows[20]):
        broken["features"] = [[0.5]]
    uri = write(path, rows)
    with pytest.raises(ConfigError, match="the features of index 3 are 1 x 1"):
        cut_captions(opened(uri), storage, PLAN)
    file = CaptionFile(uri, length=LENGTH, width=WIDTH, skip_bad=True)
    assert cut_captions(file, storage, PLAN) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"captions {uri}: 2 left out: the features of index 3 are 1 x 1; the")
    assert left_out(file) == {"captions_left_out": 2} and left_out(None) == {}
    kept = [row for i, row in enumerate(rows) if i not in (3, 20)]
    for k in range(3):
        read = read_captions(storage, k)
        assert [*read.captions] == [kept[i]["caption"] for i in PLAN.shard_range(k)]
    assert cut_captions(opened(write(path, rows_of(25))), LocalStorage(storage.uri + "2"), PLAN)
    assert capsys.readouterr().err == ""


def test_a_cut_of_the_same_content_is_kept_whatever_file_it_comes_from(
    tmp_path: Path, storage: Storage
) -> None:
    rows = rows_of(25)
    assert cut_captions(opened(write(tmp_path / "a.parquet", rows)), storage, PLAN) == 3
    before = storage.read(captions_name(1))
    assert cut_captions(opened(write(tmp_path / "a.jsonl", rows)), storage, PLAN) == 0
    storage.delete(captions_name(1))
    assert cut_captions(opened(write(tmp_path / "a.jsonl", rows)), storage, PLAN) == 1
    assert storage.read(captions_name(1)) == before


def test_an_extension_replaces_the_short_last_cut_only(path: Path, storage: Storage) -> None:
    file = opened(write(path, rows_of(40)))
    cut_captions(file, storage, PLAN)
    assert cut_captions(file, storage, plan_of(conditioning="text", num_classes=0, count=28)) == 1
    assert cut_captions(file, storage, plan_of(conditioning="text", num_classes=0, count=40)) == 2
    assert [len(read_captions(storage, k)) for k in range(4)] == [10, 10, 10, 10]


@pytest.mark.parametrize("field", ["caption", "features"])
def test_other_captions_than_those_of_the_set_are_refused(
    field: str, path: Path, storage: Storage
) -> None:
    rows = rows_of(40)
    cut_captions(opened(write(path, rows)), storage, PLAN)
    rows[23][field] = rows[24][field]
    message = "captions of shard 2 differ from those that the set was made with; give the file"
    with pytest.raises(ConfigError, match=message):
        cut_captions(opened(write(path, rows)), storage, PLAN)
    with pytest.raises(ConfigError, match=message):
        cut_captions(
            opened(write(path, rows)),
            storage,
            plan_of(conditioning="text", num_classes=0, count=40),
        )


def test_missing_damaged_and_short_cuts_are_named(path: Path, storage: Storage) -> None:
    file = opened(write(path, rows_of(25)))
    cut_captions(file, storage, PLAN)
    whole = storage.read(captions_name(1))
    with pytest.raises(ShardError, match=r"captions-00001.parquet has 10 of 11 rows; run `ddray"):
        read_captions(storage, 1, 11)
    for damaged in (whole[:-9], b"", whole[: len(whole) // 2]):
        storage.write(captions_name(1), damaged)
        for use in (lambda: read_captions(storage, 1), lambda: cut_captions(file, storage, PLAN)):
            with pytest.raises(ShardError, match=r"captions-00001.parquet is damaged \(.*delete"):
                use()
    changed = pq.read_table(pa.BufferReader(whole)).set_column(1, "caption", pa.array(["x"] * 10))
    pq.write_table(changed, Path(storage.uri) / captions_name(1))
    with pytest.raises(ShardError, match="the rows do not fit their sha256"):
        read_captions(storage, 1)
    storage.delete(captions_name(1))
    with pytest.raises(ShardError, match=r"captions-00001.parquet is missing; run `ddray sample`"):
        read_captions(storage, 1)


def test_a_batch_is_padded_on_the_right() -> None:
    one, two = np.ones((1, 3), np.float32), np.full((2, 3), 2, np.float32)
    features_BTD, mask_BT = padded([one, two])
    assert features_BTD.tolist() == [[[1] * 3, [0] * 3], [[2] * 3, [2] * 3]]
    assert mask_BT.tolist() == [[True, False], [True, True]]


# The teacher.


def test_conditions_of_rows_are_classes_or_features_with_their_mask(
    path: Path, tmp_path: Path
) -> None:
    of_classes = TrajectorySet(LocalStorage(str(tmp_path)), plan_of(classes=(7, 1)))
    classes = read_conditions(of_classes, [2, 0], None)
    assert classes.of([0, 5, 6]).tolist() == [7, 7, 1]  # type: ignore[union-attr]
    trajectories = TrajectorySet(LocalStorage(str(tmp_path / "set")), PLAN)
    cut_captions(opened(write(path, rows_of(25))), trajectories.storage, PLAN)
    conditions = read_conditions(trajectories, [1, 2], None)
    assert conditions.label.tolist() == [f"a cat, {i} öre" for i in range(10, 25)]
    features, mask = conditions.of([0, 11])
    assert mask.tolist() == [[True, False], [True, True]]
    np.testing.assert_array_equal(features[1], rows_of(22)[21]["features"])
    with_encoder = plan_of(conditioning="text", num_classes=0, text_encoder="t5")
    trajectories = TrajectorySet(trajectories.storage, with_encoder)
    seen: list[str] = []
    read_conditions(trajectories, [2], seen.extend).of([1, 3])  # type: ignore[arg-type]
    assert seen == ["a cat, 21 öre", "a cat, 23 öre"]


def test_conditions_that_the_teacher_does_not_take_are_refused(tmp_path: Path) -> None:
    of_text, of_classes = tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH), tiny_teacher()
    given = write(tmp_path / "a.jsonl", rows_of(3))
    plain = write(tmp_path / "b.jsonl", rows_of(3, features=False))
    with pytest.raises(ConfigError, match="is conditioned on captions; give --captions FILE"):
        open_captions(SampleConfig(), of_text)
    with pytest.raises(ConfigError, match=r"captions='.*', but .* is conditioned on classes"):
        open_captions(SampleConfig(captions=given), of_classes)
    with pytest.raises(ConfigError, match="text_encoder='t5', but .* is conditioned on classes"):
        open_captions(SampleConfig(text_encoder="t5"), of_classes)
    for broken, name in (
        ({"skip_bad_captions": True}, "skip_bad_captions=True"),
        (
            {"clean": "llamagen"},
            "clean='llamagen'",
        ),
    ):
        with pytest.raises(ConfigError, match=f"{name}, but .* is conditioned on classes"):
            open_captions(SampleConfig(**broken), of_classes)
    both = SampleConfig(captions=given, text_encoder="t5")
    with pytest.raises(ConfigError, match=r"text_encoder='t5', but .*a.jsonl has features already"):
        encoder_name(both, open_captions(both, of_text), {})
    assert encoder_name(SampleConfig(), opened(given), {}) == ""
    assert encoder_name(SampleConfig(), opened(plain), {}) == "google/flan-t5-xl"
    assert encoder_name(SampleConfig(), opened(plain), {"text_encoder": "words"}) == "words"
    folder = SampleConfig(text_encoder=str(tmp_path / "x" / ".."))
    assert encoder_name(folder, opened(plain), {}) == folder.text_encoder  # no folder yet
    (tmp_path / "x").mkdir()
    assert encoder_name(folder, opened(plain), {}) == str(tmp_path)


def test_a_job_says_how_its_captions_are_read(tmp_path: Path) -> None:
    of_text = tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH)
    several = [f"Cat {i}.jpg of {i}" for i in range(50)]
    given = write(tmp_path / "a.jsonl", [{"text": several}, {"text": ["cat.png"]}] * 20)
    options = {"captions": given, "caption_column": "text", "clean": "llamagen"}
    config = SampleConfig(**options, skip_bad_captions=True, seed=11)
    file = open_captions(config, of_text)
    assert file is not None
    found = [row.caption for row in file.rows(20)]
    assert found == [f"cat of {drawn(range(50), 11, i)}" for i in range(20)]
    refusing = open_captions(SampleConfig(**options), of_text)
    assert refusing is not None
    with pytest.raises(ConfigError, match="the caption of row 1 is empty"):
        refusing.check(2)


@pytest.mark.slow
def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    plan = plan_of(conditioning="text", num_classes=0, text_encoder=str(tmp_path))
    teacher = tiny_teacher(cls_token_num=LENGTH, caption_dim=WIDTH)
    with pytest.raises(ConfigError, match=r"makes features of width 8; .* takes 3"):
        check_encoder(plan, teacher)
    check_encoder(PLAN, teacher)

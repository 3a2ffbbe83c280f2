"""Facts about captions in shards: which files, in which order, and features beside them."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddray.errors import ConfigError, StorageError
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile
from tests.s3_server import BUCKET

LENGTH, WIDTH = 5, 3


def opened(uri: Path | str, **other: Any) -> CaptionFile:
    return CaptionFile(str(uri), length=LENGTH, width=WIDTH, **other)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, pa.schema({"TEXT": pa.string()})), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def captions_of(file: CaptionFile, count: int) -> list[str]:
    rows = [*file.rows(count)]
    assert [row.index for row in rows] == [*range(count)]
    return [row.caption for row in rows]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_shards_follow_one_another_by_their_names(ending: str, tmp_path: Path) -> None:
    for name, texts in {"b": ["three"], "a": ["one", "two"], "c": [], "B": ["zero"]}.items():
        write(tmp_path / "set" / f"{name}{ending}", [{"TEXT": text} for text in texts])
    for name in (".hidden" + ending, "a_stats.json", "00000.tar", "inner/d" + ending):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing that is read")
    for uri in ("set", "set/", f"set/*{ending}", f"set/[Babc]{ending}"):
        file = opened(tmp_path / uri if uri[-1] != "/" else f"{tmp_path}/{uri}")
        assert captions_of(file, 4) == ["zero", "one", "two", "three"]
    assert captions_of(opened(tmp_path / "set" / f"?{ending}"), 3) == ["zero", "one", "two"]
    assert captions_of(opened(tmp_path / "set" / f"[ab]{ending}"), 3) == ["one", "two", "three"]
    with pytest.raises(ConfigError, match="set: 4 rows, but count=5"):
        opened(tmp_path / "set").check(5)


def test_a_file_whose_name_is_a_pattern_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", [{"prompt": "itself"}])
    write(tmp_path / "a1.jsonl", [{"prompt": "the other"}])
    assert captions_of(opened(tmp_path / "a[1].jsonl"), 1) == ["itself"]


def test_shards_lie_in_s3_too(s3_endpoint: str) -> None:  # noqa: F811
    storage = open_storage(f"s3://{BUCKET}/shards of mine")
    for i in range(3):
        storage.write(f"{i}.jsonl", json.dumps({"prompt": f"cat {i}"}).encode())
    storage.write("0_stats.json", b"{}")
    for uri in (storage.uri, f"{storage.uri}/*.jsonl"):
        assert captions_of(opened(uri), 3) == ["cat 0", "cat 1", "cat 2"]
    for k in range(2):
        np.save(data := io.BytesIO(), np.full((1, 2, WIDTH), k, np.float32))
        storage.write(f"tree/part/{k}.npy", data.getvalue())
    storage.write("tree/part.jsonl", b'{"text": ["a", "b"]}\n' * 2)
    rows = [*opened(f"{storage.uri}/tree", column="text[1]").rows(2)]
    assert [float(np.mean(np.asarray(row.features_TD))) for row in rows] == [0, 1]
    with pytest.raises(ConfigError, match=r"shards of mine holds no file of such a name"):
        opened(f"{storage.uri}/*.parquet")


@pytest.mark.parametrize("offset", [0, 1], ids=["anew", "on"])
def test_the_index_of_a_shard_begins_anew_or_runs_on(offset: int, tmp_path: Path) -> None:
    for k in range(3):
        rows = [{"index": offset * 2 * k + i, "caption": f"{k}{i}"} for i in range(2)]
        write(tmp_path / f"{k}.jsonl", rows)
    assert captions_of(opened(tmp_path), 6) == ["00", "01", "10", "11", "20", "21"]
    write(tmp_path / "1.jsonl", [{"index": i, "caption": "a"} for i in (offset * 2, 5)])
    message = (
        rf"1.jsonl: index {offset * 2 + 1} is missing: row 1 has index 5; .* from {offset * 2}"
    )
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path).check(6)


def test_what_is_wrong_with_a_row_is_told_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    write(tmp_path / "b.jsonl", [{"prompt": "b"}, {"prompt": 5}])
    with pytest.raises(ConfigError, match=rf"captions {tmp_path}/b.jsonl: row 1 has no text in"):
        opened(tmp_path).check(3)
    write(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(ConfigError, match=rf"captions {tmp_path}/b.jsonl: there is no column"):
        opened(tmp_path).check(3)
    features = [{"index": 0, "caption": "b", "features": [[0.0] * 3]}]
    write(tmp_path / "b.jsonl", features)
    message = rf"b.jsonl: features must be in every file or in none; see {tmp_path}/a.jsonl"
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path).check(2)


@pytest.mark.parametrize(
    ("uri", "kind", "message"),
    [
        ("set", ConfigError, r"has files of .jsonl and .txt; say which by a pattern, such as .*"),
        ("set/*.doc", ConfigError, "holds no file of such a name, in .parquet, .jsonl, .txt, .tsv"),
        ("set/*.md", ConfigError, "must end in .parquet, .jsonl, .txt, .tsv or .csv, or be a fol"),
        ("empty", ConfigError, "holds no file of such a name"),
        ("nothing", ConfigError, "must end in .parquet, .jsonl, .txt, .tsv or .csv, or be a fold"),
        ("nothing/*.jsonl", StorageError, "cannot list captions .*nothing/"),
        ("n*/a.jsonl", StorageError, "cannot read captions .*: no such file"),
    ],
)
def test_other_places_are_refused(uri: str, kind: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "b.txt", "c.md"):
        (tmp_path / "set" / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(kind, match=message):
        opened(tmp_path / uri)


# What LlamaGen's extract_t5_feature leaves.


def tree(folder: Path, rows: dict[str, int]) -> dict[str, list[np.ndarray]]:
    """Files of lines with three captions each, and features of one of them beside."""
    made: dict[str, list[np.ndarray]] = {}
    for name, count in rows.items():
        texts = [[f"{name} {i} {key}" for key in ("blip", "llava", "first")] for i in range(count)]
        lines = [{"image_path": "x.jpg", "text": text} for text in texts]
        write(folder / f"{name}.jsonl", lines)
        (folder / name).mkdir()
        random = np.random.default_rng(len(made))
        made[name] = [random.normal(size=(1, 1 + i % LENGTH, WIDTH)) for i in range(count)]
        for i, features in enumerate(made[name]):
            np.save(folder / name / f"{i}.npy", features.astype(np.float32))
    return made


def test_features_beside_the_lines_are_those_of_the_captions(tmp_path: Path) -> None:
    made = tree(tmp_path, {"part-0": 40, "part-1": 3})
    for uri in (tmp_path, tmp_path / "*.jsonl"):
        file = opened(uri, column="text[1]")
        assert file.has_features
        rows = [*file.rows(43)]
        assert [row.caption for row in rows[38:41]] == [
            "part-0 38 llava",
            "part-0 39 llava",
            "part-1 0 llava",
        ]
        for row, features in zip(rows, made["part-0"] + made["part-1"], strict=True):
            assert row.features_TD is not None and row.features_TD.dtype == np.float32
            np.testing.assert_array_equal(row.features_TD, features[0].astype(np.float32))
    assert [row.features_TD for row in file.rows(43, features=False)] == [None] * 43


def test_a_shard_that_lacks_features_of_its_first_row_is_a_broken_row(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "0.npy").unlink()
    with pytest.raises(ConfigError, match=r"b.jsonl: row 0 has no features: .*/b/0.npy is missing"):
        [*opened(tmp_path, column="text[2]").rows(3)]
    file = opened(tmp_path, column="text[2]", skip_bad=True)
    assert captions_of(file, 3) == ["a 0 first", "a 1 first", "b 1 first"]
    (tmp_path / "a" / "0.npy").unlink()
    (tmp_path / "b" / "0.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match="b.jsonl: features must be in every file or in none"):
        opened(tmp_path, column="text[2]", skip_bad=True).check(3)


def test_features_of_one_of_several_captions_need_to_know_which(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 2})
    with pytest.raises(ConfigError, match=r"row 0 has 3 captions, and features of one .* text\[0"):
        opened(tmp_path / "a.jsonl", column="text").check(2)


def test_a_folder_of_the_same_name_without_features_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.npy").write_bytes(b"")
    assert not opened(tmp_path / "a.jsonl").has_features


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, r"row 1 has no features: .*/a/1.npy is missing"),
        (np.zeros((1, 6, 3)), "the features of row 1 are 6 x 3; the teacher takes 1 to 5"),
        (np.zeros((1, 2, 4)), "the features of row 1 are 2 x 4"),
        (np.zeros((2, 2, 3)), "the features of row 1 are no T lists of D numbers"),
        (np.zeros((2, 3)), "the features of row 1 are no T lists of D numbers"),
        (np.array([[["a"]]]), "the features of row 1 are no T lists of D numbers"),
        (np.array([{}], object), "the features of row 1 are no T lists of D numbers"),
        (np.full((1, 2, 3), np.nan), "the features of row 1 are not all finite"),
        (b"\x93NUMPY cut", "the features of row 1 are no T lists of D numbers"),
        (b"", "the features of row 1 are no T lists of D numbers"),
    ],
)
def test_features_beside_the_lines_that_are_broken_are_refused(
    stored: Any, message: str, tmp_path: Path
) -> None:
    tree(tmp_path, {"a": 3})
    path = tmp_path / "a" / "1.npy"
    path.unlink()
    if isinstance(stored, bytes):
        path.write_bytes(stored)
    elif stored is not None:
        np.save(path, stored, allow_pickle=True)
    file = opened(tmp_path / "a.jsonl", column="text[0]")
    with pytest.raises(ConfigError, match=f"captions {tmp_path}/a.jsonl: {message}"):
        [*file.rows(3)]
    file = opened(tmp_path / "a.jsonl", column="text[0]", skip_bad=True)
    assert captions_of(file, 2) == ["a 0 blip", "a 2 blip"]
    assert file.left_out.count == 1


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    for k in range(6):
        rows = [{"TEXT": "x" * 50_000 + str(i)} for i in range(20)]
        write(tmp_path / f"{k:02}.jsonl", rows)
    file = opened(tmp_path)
    tracemalloc.start()
    try:
        file.check(120)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()

"""Facts about image sets: what lies in a shard of each encoding, same bytes twice, plans."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddray.errors import ConfigError, ShardError, StorageError
from ddray.images import ImagePlan, ImageSet, encode_png

PLAN = ImagePlan(
    student="tiny",
    student_fingerprint="a" * 64,
    tokenizer_fingerprint="b" * 64,
    num_classes=3,
    seed=4,
    schedule="0",
    encoding="parquet",
    count=7,
    shard_rows=5,
    batch_size=2,
    threads=1,
)


def _plan(**changes: Any) -> ImagePlan:
    return dataclasses.replace(PLAN, **changes)


def _images(channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).random((7, channels, 4, 6), dtype=np.float32)


def _pixels(images: np.ndarray) -> list[np.ndarray]:
    levels = np.rint(images * 255).astype(np.uint8)
    return [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in levels]


def _write(folder: Path, images: np.ndarray, **changes: Any) -> ImageSet:
    shards = ImageSet.create(str(folder), _plan(**changes))
    for k in shards.missing():
        rows = shards.plan.shard_range(k)
        shards.write_shard(k, images[rows.start : rows.stop])
    return shards


def _decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_parquet_shard_holds_index_label_and_png(tmp_path: Path, channels: int) -> None:
    images = _images(channels)
    _write(tmp_path, images)
    files = sorted((tmp_path / "shards").iterdir())
    tables = [pq.read_table(file) for file in files]
    assert [len(table) for table in tables] == [5, 2]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    for row, pixels in zip(rows, _pixels(images), strict=True):
        np.testing.assert_array_equal(_decode(row["png"]), pixels)
    assert tables[0].schema.metadata[b"ddray.plan_hash"].decode() == PLAN.hash


def test_a_webdataset_shard_is_a_tar_of_png_and_class(tmp_path: Path) -> None:
    images = _images()
    _write(tmp_path, images, encoding="webdataset")
    found = {}
    for file in sorted((tmp_path / "shards").iterdir()):
        assert file.suffix == ".tar"
        with tarfile.open(file) as archive:
            names = archive.getnames()
            # WebDataset groups neighbours of one base name.
            assert [n.partition(".")[0] for n in names[::2]] == [
                n.partition(".")[0] for n in names[1::2]
            ]
            found |= {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert len(found) == 14
    for i, pixels in enumerate(_pixels(images)):
        np.testing.assert_array_equal(_decode(found[f"{i:09d}.png"]), pixels)
        assert found[f"{i:09d}.cls"] == str(i % 3).encode()


def test_an_image_shard_lists_its_files_and_is_whole_with_the_list(tmp_path: Path) -> None:
    images = _images()
    shards = _write(tmp_path, images, encoding="images")
    names = [
        name
        for file in sorted((tmp_path / "shards").iterdir())
        for name in json.loads(file.read_text())
    ]
    assert names == [f"images/{i:09d}-{i % 3}.png" for i in range(7)]
    for name, pixels in zip(names, _pixels(images), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), pixels)
    (tmp_path / shards.plan.shard_name(1)).unlink()
    assert shards.missing() == [1]


@pytest.mark.parametrize("encoding", ["parquet", "webdataset", "images"])
def test_the_same_images_give_the_same_bytes(tmp_path: Path, encoding: str) -> None:
    for name in ("a", "b"):
        _write(tmp_path / name, _images(), encoding=encoding)
    files = [f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*") if f.is_file()]
    assert len(files) > 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_tar_carries_no_date_and_no_owner(tmp_path: Path) -> None:
    _write(tmp_path, _images(), encoding="webdataset")
    with tarfile.open(next((tmp_path / "shards").iterdir())) as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in archive} == {(0, 0, 0, "")}


def test_a_png_is_a_function_of_the_pixels() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert encode_png(pixels) == encode_png(pixels.copy(order="F"))
    np.testing.assert_array_equal(_decode(encode_png(pixels)), pixels)


def test_another_plan_at_the_uri_is_refused_with_what_differs(tmp_path: Path) -> None:
    _write(tmp_path, _images())
    with pytest.raises(
        ConfigError, match="another plan .seed: 4 there, 5 now; schedule: '0' there"
    ):
        ImageSet.create(str(tmp_path), _plan(seed=5, schedule="0,2"))
    with pytest.raises(ConfigError, match="count: 7 there, 6 now"):
        ImageSet.create(str(tmp_path), _plan(count=6))
    assert ImageSet.open(str(tmp_path)).plan == PLAN


@pytest.mark.parametrize("encoding", ["parquet", "webdataset", "images"])
def test_an_extension_keeps_full_shards_and_makes_the_short_one_anew(
    tmp_path: Path, encoding: str
) -> None:
    _write(tmp_path, _images(), encoding=encoding)
    more = ImageSet.create(str(tmp_path), _plan(count=12, encoding=encoding))
    assert more.missing() == [1, 2]
    images = np.concatenate([_images()] * 2)
    for k in more.missing():
        rows = more.plan.shard_range(k)
        more.write_shard(k, images[rows.start : rows.stop])
    # Whoever reads all of shards/ must find every image once.
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_a_shard_takes_exactly_its_images(tmp_path: Path) -> None:
    shards = ImageSet.create(str(tmp_path), PLAN)
    with pytest.raises(ShardError, match="shard 1 takes 2 images, got 7"):
        shards.write_shard(1, _images())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no image set's manifest"),
        ("[]", "no image set's manifest"),
        ('{"format": 1}', "no image set's manifest"),
        ('{"format": 2}', "is of format 2, not 1"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        ImageSet.create(str(tmp_path), PLAN)


def test_a_missing_set_and_an_unwritable_uri_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no image set at"):
        ImageSet.open(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        ImageSet.create(str(tmp_path / "file" / "set"), PLAN)

"""The formats of image sets: what readers are told, sets of format 1, one folder, one array."""

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ddray.errors import ConfigError, ShardError
from ddray.report.image_file import decode_image
from ddray.sets.images.features import label_names
from ddray.sets.images.image_set import SAMPLES, ImageSet
from ddray.sets.images.samples import write_samples
from ddray.sets.inspection import verify
from ddray.storage.image_array import npz_chunks
from tests.core.sets.images.test_image_set import FORMATS, PLAN, fill, images_like, pixels_of, write
from tests.paths import GOLDEN


def test_the_schema_tells_hugging_face_what_is_an_image_and_what_a_class(tmp_path: Path) -> None:
    names = ("a crane", "a cat", "a crane", *"defghijkl")
    write(tmp_path, pixels_of(), class_names=names)
    schema = pq.read_schema(tmp_path / "shards/shard-00000.parquet")
    # Types that differ from those that `datasets` would write would have it pass the names over.
    assert [str(field.type) for field in schema] == [
        *("int64", "int64", "int64"),
        "struct<bytes: binary, path: string>",
    ]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"}
    assert features["label"]["names"][:4] == ["a crane (0)", "a cat", "a crane (2)", "d"]
    assert features["index"] == features["seed"] == {"dtype": "int64", "_type": "Value"}
    assert label_names(PLAN) == [str(i) for i in range(12)]


# Format 1.


@pytest.fixture(scope="module")
def format_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of `PLAN`'s images, of tokens and of captions as ddray wrote them before format 2."""
    folder = tmp_path_factory.mktemp("format-1")
    with tarfile.open(GOLDEN / "begun" / "images-format-1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", [*FORMATS, "tokens", "captions"])
def test_a_set_of_format_1_goes_on_in_it(format_1: Path, name: str) -> None:
    images = ImageSet.open(str(format_1 / name))
    assert (images.plan.format, images.missing()) == (1, [])
    rows = images.read_shard(1)
    schema = _schema(images)
    images.storage.delete(images.shard_name(1))
    # What an order of today has: the format of today, with names for its classes.
    today = dataclasses.replace(
        images.plan, format=2, class_names=tuple("abcdefghijkl"[: images.plan.num_classes])
    )
    begun = ImageSet.create(images.uri, today)
    assert (begun.plan, begun.missing()) == (images.plan, [1])
    begun.write_shard(1, rows.label, rows.content)
    assert json.loads((format_1 / name / "manifest.json").read_text())["format"] == 1
    if name != "captions":
        assert verify(images.uri) == []
    assert images.read_shard(1).label.tolist() == rows.label.tolist()
    assert _schema(images) == schema
    more = ImageSet.create(images.uri, dataclasses.replace(today, count=12))
    assert (more.missing(), more.plan.format) == ([1, 2], 1)


def _schema(images: ImageSet) -> Any:
    """Of the second shard, where it is Parquet."""
    if images.suffix != "parquet":
        return None
    return pq.read_schema(f"{images.uri}/{images.shard_name(1)}")


def test_differing_class_names_are_told_on_a_part_of_a_line(tmp_path: Path) -> None:
    names = tuple(f"a rather long name of class {i}" for i in range(12))
    ImageSet.create(str(tmp_path), images_like(class_names=names))
    with pytest.raises(
        ConfigError, match=r"class_names is \('a rather long .* \.\.\. there"
    ) as told:
        ImageSet.create(str(tmp_path), images_like())
    assert len(str(told.value)) < 600


# All in one folder, and all in one array.


def test_flat_images_lie_in_one_folder_in_the_order_of_their_indices(tmp_path: Path) -> None:
    pixels = pixels_of()
    write(tmp_path, pixels, encoding="flat")
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(7)]
    for file, expected in zip(files, pixels, strict=True):
        np.testing.assert_array_equal(decode_image(file.read_bytes()), expected)
    (tmp_path / "images" / "000007.png").write_bytes(b"")
    assert verify(str(tmp_path)) == ["does not belong: images/000007.png"]


@pytest.mark.parametrize("colour", [False, True])
def test_samples_are_all_pixels_in_three_channels(tmp_path: Path, colour: bool) -> None:
    pixels = pixels_of(colour=colour)
    write(tmp_path, pixels, encoding="npz")
    with np.load(tmp_path / SAMPLES) as samples:
        assert samples.files == ["arr_0"]
        array = samples["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (7, 4, 6, 3))
    np.testing.assert_array_equal(array, pixels if colour else np.stack([pixels] * 3, -1))


def test_samples_are_of_a_whole_set_or_not_there(tmp_path: Path) -> None:
    images = write(tmp_path, pixels_of(), encoding="npz")
    more = ImageSet.create(images.uri, images_like(count=12, encoding="npz"))
    more.begin()
    assert verify(images.uri)[-1] == f"missing: {SAMPLES}"
    with pytest.raises(ShardError, match="shard-00001.parquet: it has 2 of 5 rows"):
        write_samples(more)
    assert {file.name for file in tmp_path.iterdir()} == {"manifest.json", "shards"}
    fill(more, pixels_of())
    assert verify(images.uri) == []
    assert np.load(tmp_path / SAMPLES)["arr_0"].shape == (12, 4, 6, 3)


def test_an_array_is_written_no_faster_than_its_parts_come() -> None:
    asked = []

    def parts() -> Any:
        for i in range(1000):
            asked.append(i)
            yield np.full((8, 8, 3), i % 256, np.uint8)

    written = 0
    for chunk in npz_chunks((1000, 8, 8, 3), parts()):
        assert len(chunk) < 1000
        written += len(chunk)
        assert written <= len(asked) * 192 + 1000

"""Facts about image sets: what a shard of each format holds, same bytes twice, plans, damage."""

import dataclasses
import json
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddray.errors import ConfigError, ShardError, StorageError
from ddray.report.image_file import decode_image, encode_png, encode_webp
from ddray.sets.images.finishing import finish
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.plan import ImagePlan
from ddray.sets.inspection import describe, open_set, quarantine, verified, verify
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from tests.core.sets.trajectories.test_trajectory_set import plan_of

PLAN = ImagePlan(
    student="tiny",
    student_fingerprint="a" * 64,
    tokenizer_fingerprint="b" * 64,
    conditioning="class",
    num_classes=12,
    seed=4,
    noise_scheme="philox-1",
    schedule="0",
    encoding="parquet",
    content="images",
    image_format="png",
    quality=None,
    threads=1,
    count=7,
    shard_rows=5,
    batch_size=2,
    stages=(1, 4),
    vocab_size=256,
)
FORMATS = ("parquet", "webdataset", "images")
ALL_FORMATS = (*FORMATS, "flat", "npz")
SUFFIX = {
    **{"parquet": "parquet", "webdataset": "tar", "images": "json"},
    **{"flat": "json", "npz": "parquet"},
}


def images_like(**changes: Any) -> ImagePlan:
    return dataclasses.replace(PLAN, **changes)


@pytest.mark.parametrize(("name", "value"), [("decode_dtype", "bfloat16"), ("compression", "fast")])
def test_a_set_from_before_a_setting_is_the_set_that_it_was(name: str, value: str) -> None:
    assert name not in json.loads(PLAN.to_json()) and ImagePlan.from_json(PLAN.to_json()) == PLAN
    other = images_like(**{name: value})
    assert json.loads(other.to_json())[name] == value and other.hash != PLAN.hash
    assert ImagePlan.from_json(other.to_json()) == other


@pytest.mark.parametrize("colour", [False, True])
def test_fast_files_hold_the_same_pixels(colour: bool) -> None:
    # A ramp with some noise: what a photograph is to a compressor.
    steps = np.arange(64)[:, None] + np.arange(64)[None]
    noise = np.random.default_rng(1).integers(0, 4, (64, 64, 3))
    image = (steps[..., None] + noise).astype(np.uint8)
    image = image if colour else np.ascontiguousarray(image[..., 0])
    for encode in (encode_png, encode_webp):
        files = encode(image), encode(image, fast=True)
        assert files[0] != files[1]
        for shown in map(decode_image, files):
            grey = shown if shown.ndim == image.ndim else shown[..., 0]
            np.testing.assert_array_equal(grey, image)
    assert encode_webp(image, 90, fast=True) != encode_webp(image, 90)


def pixels_of(count: int = 7, *, colour: bool = False) -> np.ndarray:
    shape = (count, 4, 6, 3) if colour else (count, 4, 6)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fill(images: ImageSet, pixels: np.ndarray) -> list[int]:
    """Write what is missing, as a run does; row i has pixels i mod their number."""
    plan, missing = images.plan, images.missing()
    if missing:
        images.begin()
    for k in missing:
        index = np.asarray(plan.shard_range(k))
        encode = encode_png if plan.image_format == "png" else encode_webp
        files = [encode(pixels[i % len(pixels)]) for i in index]
        images.write_shard(k, plan.label(index), files)
    finish(images, images.lacking())
    return missing


def write(folder: Path, pixels: np.ndarray, **changes: Any) -> ImageSet:
    images = ImageSet.create(str(folder), images_like(**changes))
    fill(images, pixels)
    return images


def _files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# What a shard holds.


@pytest.mark.parametrize("colour", [False, True])
def test_a_parquet_shard_holds_index_label_seed_and_image(tmp_path: Path, colour: bool) -> None:
    pixels = pixels_of(colour=colour)
    write(tmp_path, pixels)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "shards").iterdir())]
    assert [len(table) for table in tables] == [5, 2]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [list(row) for row in rows] == [["index", "label", "seed", "image"]] * 7
    assert [(row["index"], row["label"], row["seed"]) for row in rows] == [
        (i, i, 4) for i in range(7)
    ]
    for row, expected in zip(rows, pixels, strict=True):
        np.testing.assert_array_equal(decode_image(row["image"]["bytes"]), expected)
        assert row["image"]["path"] == f"{row['index']:09d}.png"
    assert tables[0].schema.metadata[b"ddray.plan_hash"].decode() == PLAN.hash


def test_a_shard_of_tokens_holds_small_integers(tmp_path: Path) -> None:
    images = ImageSet.create(str(tmp_path), images_like(content="tokens"))
    tokens = np.arange(35).reshape(7, 5)
    for k, rows in ((0, slice(0, 5)), (1, slice(5, 7))):
        images.write_shard(k, np.arange(7)[rows], tokens[rows])
    table = pq.read_table(tmp_path / "shards/shard-00000.parquet")
    assert str(table.schema.field("tokens").type) == "fixed_size_list<element: uint16>[5]"
    assert table["tokens"].to_pylist() == tokens[:5].tolist()
    np.testing.assert_array_equal(images.read_shard(1).content, tokens[5:])
    assert verify(str(tmp_path)) == []


def test_a_webdataset_shard_is_a_tar_of_image_and_class(tmp_path: Path) -> None:
    pixels = pixels_of()
    write(tmp_path, pixels, encoding="webdataset")
    found = {}
    for file in sorted((tmp_path / "shards").iterdir()):
        assert file.suffix == ".tar"
        with tarfile.open(file) as archive:
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in archive} == {(0, 0, 0, "")}
            assert archive.pax_headers["ddray.seed"] == "4"
            names = archive.getnames()
            # WebDataset groups neighbours of one base name.
            assert [n.partition(".")[0] for n in names[::2]] == [
                n.partition(".")[0] for n in names[1::2]
            ]
            found |= {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert len(found) == 14
    for i, expected in enumerate(pixels):
        np.testing.assert_array_equal(decode_image(found[f"{i:09d}.png"]), expected)
        assert found[f"{i:09d}.cls"] == str(i).encode()


def test_an_image_folder_has_a_folder_for_each_class(tmp_path: Path) -> None:
    pixels = pixels_of()
    images = write(tmp_path, pixels, encoding="images", classes=(0, 11))
    listed = [
        image
        for file in sorted((tmp_path / "shards").iterdir())
        for image in json.loads(file.read_text())["images"]
    ]
    # Names of one width: readers of such folders number the classes by the order of names.
    assert [image["file"] for image in listed] == [
        f"images/{'11' if i % 2 else '00'}/{i:09d}.png" for i in range(7)
    ]
    assert [image["label"] for image in listed] == [0, 11, 0, 11, 0, 11, 0]
    for image, expected in zip(listed, pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / image["file"])), expected)
    (tmp_path / images.shard_name(1)).unlink()
    assert images.missing() == [1]


@pytest.mark.parametrize("encoding", FORMATS)
def test_captions_stand_in_place_of_labels(tmp_path: Path, encoding: str) -> None:
    plan = images_like(encoding=encoding, conditioning="text", num_classes=0, text_encoder="t5")
    images = ImageSet.create(str(tmp_path), plan)
    captions = np.array([f'"{i}": ein Kätzchen\n' for i in range(7)], dtype=object)
    for k in range(2):
        rows = plan.shard_range(k)
        files = [encode_png(p) for p in pixels_of()[rows.start : rows.stop]]
        images.write_shard(k, captions[rows.start : rows.stop], files)
        assert images.read_shard(k).label.tolist() == captions[rows.start : rows.stop].tolist()
    assert images.verify().ok


@pytest.mark.parametrize(
    ("encoding", "image_format"),
    [*product((*FORMATS, "flat"), ("png", "webp")), ("npz", "png")],
)
def test_the_same_images_give_the_same_bytes(
    tmp_path: Path, encoding: str, image_format: str
) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, pixels_of(), encoding=encoding, image_format=image_format)
    assert len(_files(tmp_path / "a")) > 2
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_files_are_functions_of_the_pixels() -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for encode in (encode_png, encode_webp, lambda p: encode_webp(p, 80)):
        assert encode(grey) == encode(grey.copy(order="F"))
    np.testing.assert_array_equal(decode_image(encode_png(grey)), grey)
    # WebP knows no grey.
    np.testing.assert_array_equal(decode_image(encode_webp(grey)), np.stack([grey] * 3, -1))
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, -1)
    lossy = decode_image(encode_webp(smooth, 80)).astype(int)
    assert 0 < np.abs(lossy - smooth).max() < 16


# Plans.


def test_another_plan_at_the_uri_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, pixels_of())
    told = "holds an image set of another plan: seed is 4 there and 5 here; schedule is '0' there"
    with pytest.raises(ConfigError, match=told):
        ImageSet.create(str(tmp_path), images_like(seed=5, schedule="0,2"))
    with pytest.raises(ConfigError, match="count=6 is below the 7 rows of the set at"):
        ImageSet.create(str(tmp_path), images_like(count=6))
    assert ImageSet.open(str(tmp_path)).plan == PLAN


def test_a_student_that_was_moved_goes_on(tmp_path: Path) -> None:
    write(tmp_path, pixels_of())
    assert ImageSet.create(str(tmp_path), images_like(student="elsewhere")).missing() == []
    assert ImageSet.open(str(tmp_path)).plan.student == "elsewhere"


@pytest.mark.parametrize("encoding", ALL_FORMATS)
def test_an_extension_keeps_full_shards_and_makes_the_short_one_anew(
    tmp_path: Path, encoding: str
) -> None:
    write(tmp_path, pixels_of(), encoding=encoding)
    more = ImageSet.create(str(tmp_path), images_like(count=12, encoding=encoding))
    assert fill(more, pixels_of()) == [1, 2]
    # Whoever reads all of shards/ must find every image once.
    assert len(list((tmp_path / "shards").iterdir())) == 3
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "zip"}, "encoding='zip' must be one of parquet, webdataset, images, flat"),
        ({"encoding": "npz", "image_format": "webp"}, "encoding='npz' holds pixels, which takes"),
        ({"encoding": "images", "content": "tokens"}, "content='tokens' lies in Parquet, not in"),
        ({"quality": 80}, "quality=80 is of lossy WebP images alone"),
        ({"quality": 101, "image_format": "webp"}, "quality=101 must be an integer from 1 to 100"),
        ({"classes": (12,)}, r"classes=\[12\] holds 12; the student's classes are 0 to 11"),
        ({"text_encoder": "t5"}, "text_encoder='t5' is for captions; the student takes classes"),
        ({"student": ""}, "student='' must be a text"),
        ({"class_names": ("a",)}, "1 class_names; a set of format 2 and 12 classes has 12"),
        ({"class_names": "abcdefghijkl"}, "class_names='abcdefghijkl' must be a tuple of texts"),
        ({"class_names": "abcdefghijkl", "format": 1}, "class_names='abc"),
        ({"class_names": (*"abcdefghijkl",), "format": 1}, "format 1 and 12 classes has 0"),
        ({"format": 3}, "format=3 must be 1 or 2"),
    ],
)
def test_bad_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        images_like(**changes)


def test_a_shard_takes_exactly_its_images(tmp_path: Path) -> None:
    images = ImageSet.create(str(tmp_path), PLAN)
    with pytest.raises(ShardError, match="shard 1 not written: it takes 2 rows, got 7 labels and"):
        images.write_shard(1, np.arange(7), [b""] * 7)


# What is no set, or not all of it.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json: not JSON"),
        ("[]", "not a ddray manifest"),
        ('{"format": 1}', "it is of a set of trajectories, which is no image set"),
        ('{"format": 3, "kind": "images"}', "format 3 is unknown; ddray .* reads format 1 or 2:"),
        ('{"format": 1, "kind": "images"}', "not a plan: unknown fields"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        ImageSet.create(str(tmp_path), PLAN)


def test_the_two_kinds_of_sets_are_told_apart(tmp_path: Path) -> None:
    TrajectorySet.create(str(tmp_path / "a"), plan_of())
    ImageSet.create(str(tmp_path / "b"), PLAN)
    with pytest.raises(ShardError, match="it is of a set of images, which is no trajectory set"):
        TrajectorySet.open(str(tmp_path / "b"))
    assert isinstance(open_set(str(tmp_path / "a")).plan, TrajectoryPlan)
    assert isinstance(open_set(str(tmp_path / "b")).plan, ImagePlan)


def test_a_missing_set_and_an_unwritable_uri_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no image set at .* or run `ddray generate` first"):
        ImageSet.open(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        ImageSet.create(str(tmp_path / "file" / "set"), PLAN)


@pytest.mark.parametrize("encoding", FORMATS)
def test_a_flipped_byte_never_changes_what_is_read(tmp_path: Path, encoding: str) -> None:
    images = write(tmp_path, pixels_of(), encoding=encoding)
    path = tmp_path / images.shard_name(0)
    whole, rows, num_refused = path.read_bytes(), images.read_shard(0), 0
    # A tar is mostly zeros.
    step = 131 if encoding == "webdataset" else 13
    for at in range(0, len(whole), step):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            read = images.read_shard(0)
        except ShardError as error:
            assert "\n" not in str(error)
            num_refused += 1
            continue
        assert list(read.content) == list(rows.content)
        assert read.label.tolist() == rows.label.tolist()
    assert num_refused > len(whole) / step / 8


@pytest.mark.parametrize("encoding", ALL_FORMATS)
def test_damage_is_found_moved_aside_and_refilled(tmp_path: Path, encoding: str) -> None:
    images = write(tmp_path, pixels_of(), encoding=encoding)
    before = _files(tmp_path)
    name = images.shard_name(0)
    path = tmp_path / name
    path.write_bytes(before[name][: len(before[name]) // 2])
    (tmp_path / "shards" / "copy").write_bytes(b"")
    problems = verify(str(tmp_path))
    assert problems[0].startswith(f"damaged: {name}: ")
    assert problems[1:] == ["does not belong: shards/copy"]
    lines = quarantine(images, verified(images))
    assert lines[0] == f"{name} moved to quarantine/shard-00000.{SUFFIX[encoding]}.bad"
    assert fill(images, pixels_of()) == [0]
    assert {n: d for n, d in _files(tmp_path).items() if not n.startswith("quarantine")} == before
    assert verify(str(tmp_path)) == []


def test_a_changed_missing_or_foreign_image_is_found_in_a_folder(tmp_path: Path) -> None:
    images = write(tmp_path, pixels_of(), encoding="images")
    (tmp_path / "images/00/000000000.png").write_bytes(encode_png(pixels_of()[1]))
    (tmp_path / "images/06/000000006.png").unlink()
    (tmp_path / "images/06/000000099.png").write_bytes(b"")
    assert verify(str(tmp_path)) == [
        "damaged: shards/shard-00000.json: the rows do not fit their sha256",
        "damaged: shards/shard-00001.json: images/06/000000006.png is missing",
        "does not belong: images/06/000000099.png",
    ]
    quarantine(images, verified(images))
    fill(images, pixels_of())
    assert verify(str(tmp_path)) == []


def test_foreign_shards_are_refused(tmp_path: Path) -> None:
    for encoding in FORMATS:
        images = write(tmp_path / encoding, pixels_of(), encoding=encoding, count=10)
        other = write(tmp_path / "other" / encoding, pixels_of(), encoding=encoding, seed=9)
        path = tmp_path / encoding / images.shard_name(1)
        path.write_bytes((tmp_path / encoding / images.shard_name(0)).read_bytes())
        with pytest.raises(ShardError, match="it is shard 0, renamed; delete it and rerun"):
            images.read_shard(1)
        path.write_bytes((Path(other.uri) / other.shard_name(0)).read_bytes())
        with pytest.raises(ShardError, match="it belongs to plan"):
            images.read_shard(1)


def test_a_set_is_described(tmp_path: Path) -> None:
    images = write(tmp_path, pixels_of(), encoding="webdataset", classes=(3, 3, 5))
    (tmp_path / images.shard_name(1)).unlink()
    told = describe(str(tmp_path))
    assert (told["student"], told["encoding"], told["quality"]) == ("tiny", "webdataset", None)
    assert (told["rows"], told["rows_planned"], told["first_missing"]) == (5, 7, [1])
    assert told["labels"]["most_frequent"] == {"class": 3, "rows": 4}
    assert "tokens" not in told
    assert json.loads(json.dumps(told)) == told


def test_with_statistics_a_shard_without_them_is_missing(tmp_path: Path) -> None:
    images = write(tmp_path, pixels_of())
    images.statistics = "digits"
    assert images.missing() == [0, 1]
    index = np.arange(5)
    files = [encode_png(p) for p in pixels_of()[:5]]
    images.write_shard(0, PLAN.label(index), files, statistics=b"sums")
    assert images.missing() == [1]
    # Statistics of a short last shard are not those of the longer one that takes its place.
    images.write_shard(1, PLAN.label([5, 6]), files[:2], statistics=b"sums")
    assert images.missing() == []
    more = ImageSet.create(str(tmp_path), images_like(count=10))
    assert fill(more, pixels_of()) == [1]
    more.statistics = "digits"
    assert more.missing() == [1]

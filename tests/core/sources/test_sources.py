"""Facts about sources of images: one order, one way to read, whatever they lie in."""

import pickle
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ddray.errors import ConfigError, DDRayError, ShardError, StorageError
from ddray.report.image_file import encode_png
from ddray.sources import BrokenImage, ImageSource, npz, open_source, webdataset
from ddray.storage import open_storage
from tests.core.sources.corpus import (
    COUNT,
    FILES,
    PIXELS,
    SOURCES,
    npz_of,
    parquet_of,
    struct_column,
    tar_of,
    write,
)
from tests.s3_server import BUCKET


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "source")
    request.getfixturevalue("s3_endpoint")
    return f"s3://{BUCKET}/" + re.sub(r"\W+", "-", request.node.name)


def read(source: ImageSource, rows: range | None = None) -> np.ndarray:
    return np.stack([*source.read(rows or range(source.count))])  # type: ignore[arg-type]


# A service is asked for one of each kind: it takes longer.
S3_KINDS = ("webdataset", "npz", "packed npz")
SLOW_S3_KINDS = ("by class", "Hugging Face", "ours images")
EVERYWHERE = [
    *(("local", kind) for kind in SOURCES),
    *(("s3", kind) for kind in S3_KINDS),
    *(pytest.param("s3", kind, marks=pytest.mark.slow) for kind in SLOW_S3_KINDS),
]


@pytest.mark.parametrize(("place", "kind"), EVERYWHERE, indirect=["place"])
def test_the_same_images_are_the_same_in_every_kind_of_source(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of two or three images.
    monkeypatch.setattr(webdataset, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(npz, "BLOCK_BYTES", 200)
    source = open_source(SOURCES[kind](place))
    assert (source.count, source.uri[:1]) == (COUNT, place[:1])
    np.testing.assert_array_equal(read(source), PIXELS)
    there = pickle.loads(pickle.dumps(source))
    choice = np.random.default_rng(1)
    for _ in range(1 if place.startswith("s3") else 4):
        start, stop = sorted(choice.choice(COUNT + 1, 2, replace=False).tolist())
        for one in (source, there):
            np.testing.assert_array_equal(read(one, range(start, stop)), PIXELS[start:stop])
    apart = [0, 3, 4, 9, COUNT - 1]
    found = [*source.read(apart)]
    np.testing.assert_array_equal(np.stack(found), PIXELS[apart])  # type: ignore[arg-type]
    # Whoever stops early leaves nothing open that the next would trip over.
    for _ in range(2):
        reading = source.read(range(3, COUNT))
        np.testing.assert_array_equal(next(reading), PIXELS[3])
        reading.close()  # type: ignore[attr-defined]
    assert open_source(source.uri).fingerprint == source.fingerprint == there.fingerprint
    assert list(source.read(range(0))) == []
    with pytest.raises(ValueError, match="no ascending rows of 13"):
        next(source.read(range(COUNT + 1)))


def test_kinds_have_their_names(tmp_path: Path) -> None:
    kinds = {kind: open_source(make(str(tmp_path / kind))).kind for kind, make in SOURCES.items()}
    named = ["folder"] * 3 + ["webdataset"] + ["parquet"] * 2 + ["npz"] * 2 + ["image set"] * 5
    assert list(kinds.values()) == named


def test_the_fingerprint_is_of_what_is_there(place: str) -> None:
    write(place, {"a.png": FILES[0], "b.png": FILES[1]})
    first = open_source(place).fingerprint
    assert open_source(f"{place}/*.png").fingerprint == first
    write(place, {"c.txt": b"none of it"})
    assert open_source(place).fingerprint == first
    write(place, {"c.png": FILES[2]})
    with_another = open_source(place).fingerprint
    assert with_another != first
    write(place, {"c.png": FILES[2] + b"longer"})
    assert open_source(place).fingerprint != with_another
    if place.startswith("s3"):
        # The service tells by its ETag what size and name do not.
        write(place, {"c.png": FILES[2][:-1] + b"?"})
        assert open_source(place).fingerprint not in (first, with_another)


def test_broken_images_are_named_and_the_others_are_there(place: str) -> None:
    files = dict(enumerate(FILES))
    files[7] = FILES[7][:60]
    files[11] = b"<html>no such page</html>"
    folder = write(f"{place}/a", {f"{i:02d}.png": file for i, file in files.items()})
    tars = write(f"{place}/b", {"x.tar": tar_of([(f"{i}.png", f) for i, f in files.items()])})
    missing = [None if i == 9 else file for i, file in files.items()]
    rows = write(f"{place}/c", {"x.parquet": parquet_of({"image": struct_column(missing)})})
    expected = [(folder, "07.png", "11.png", 2), (tars, "x.tar/7.png", "x.tar/11.png", 2)]
    for uri, name, other, count in [*expected, (rows, "x.parquet row 7", "x.parquet row 11", 3)]:
        found = [*open_source(uri).read(range(COUNT))]
        broken = [image for image in found if isinstance(image, BrokenImage)]
        assert len(broken) == count and (broken[0].index, broken[-1].index) == (7, 11)
        assert str(broken[0]).startswith(f"{name} is damaged or truncated (")
        assert (
            str(broken[-1]) == f"{other} is no image but an HTML page, such as a login or an error"
        )
        np.testing.assert_array_equal(found[12], PIXELS[12])
    assert str(broken[1]) == "x.parquet row 9 has no bytes, only the path 9.png"


def test_what_has_gone_since_it_was_listed_is_a_broken_image(place: str) -> None:
    source = open_source(write(place, {"a.png": FILES[0], "b.png": FILES[1]}))
    open_storage(place).delete("b.png")
    assert list(source.read(range(1, 2))) == [BrokenImage(1, "b.png", "is no longer there")]
    tar = tar_of([("a.png", FILES[0]), ("b.png", FILES[1])])
    source = open_source(write(f"{place}/tars", {"x.tar": tar}))
    write(f"{place}/tars", {"x.tar": tar[:1100]})
    (broken,) = source.read(range(1, 2))
    assert str(broken) == "x.tar/b.png is cut: its tar is shorter now"


def test_an_image_of_another_size_is_refused_by_both_sizes(tmp_path: Path) -> None:
    odd = encode_png(np.zeros((8, 4, 3), np.uint8))
    uri = write(str(tmp_path), dict(zip("abcde", FILES, strict=False)) | {"b": odd})
    for name in "abcde":
        (tmp_path / name).rename(tmp_path / f"{name}.png")
    found = [*open_source(uri).read(range(5))]
    assert str(found[1]) == (
        "b.png is 4 x 8 pixels, and a.png is 5 x 6; --size crops and resizes all of them alike"
    )
    assert [isinstance(image, BrokenImage) for image in found] == [False, True, False, False, False]
    assert {image.shape for image in open_source(uri, size=3).read(range(5))} == {(3, 3, 3)}  # type: ignore[union-attr]
    write(uri, {"c.png": odd, "d.png": odd})
    with pytest.raises(ConfigError, match="of 5 images looked at 3 cannot be used; b.png is 4 x 8"):
        open_source(uri)


REFUSED: dict[str, tuple[dict[str, bytes], str, type[DDRayError], str]] = {
    "nothing": ({}, "", StorageError, "does not exist"),
    "braces": ({}, "/x-{000..009}.tar", StorageError, "braces are not expanded, "),
    "no images": (
        {"a.txt": b"1", "b.txt": b"", "c.json": b"", "LICENSE": b""},
        "",
        ConfigError,
        "holds no images, tars, Parquet files or .npz, only 2 .txt, 1 without an ending, 1 .json",
    ),
    "mixed kinds": (
        {"a.png": b"", "x/b.tar": b"", "x/c.tar": b""},
        "",
        ConfigError,
        r"holds 1 image and 2 tars; say which by a pattern, such as .*/\*\*/\*.png",
    ),
    "a pattern of nothing": (
        {"a.png": b""},
        "/x*/*.png",
        StorageError,
        r"no file matches .*/x\*/\*.png; ",
    ),
    "no column": (
        {"a.parquet": parquet_of({"index": [1], "text": ["a"]})},
        "",
        ConfigError,
        r"a.parquet has no column of images; it has index \(int64\), text \(string\)",
    ),
    "two columns": (
        {"a.parquet": parquet_of({"left": FILES, "right": FILES})},
        "",
        ConfigError,
        "has images in left, right; say which by --column",
    ),
    "no rows": (
        {"a.parquet": parquet_of({"image": struct_column([])})},
        "",
        ConfigError,
        "its 1 Parquet files hold no rows",
    ),
    "damaged Parquet": (
        {"a.parquet": parquet_of({"image": struct_column(FILES)})[:500]},
        "",
        ConfigError,
        "a.parquet is damaged or no Parquet: ",
    ),
    "a page for Parquet": (
        {"a.parquet": b"<html></html>"},
        "/a.parquet",
        ConfigError,
        "is damaged or no Parquet: it is an HTML page",
    ),
    "no arr_0": (
        {"a.npz": npz_of(mu=np.zeros(2), sigma=np.eye(2))},
        "",
        ConfigError,
        "a.npz has no arr_0; it holds mu.npy, sigma.npy",
    ),
    "floats": (
        {"a.npz": npz_of(arr_0=np.zeros((2, 4, 4, 3)))},
        "",
        ConfigError,
        r"no array of images .* arr_0 is float64 \[2, 4, 4, 3\], not uint8",
    ),
    "grey array": (
        {"a.npz": npz_of(arr_0=np.zeros((2, 4, 4), np.uint8))},
        "",
        ConfigError,
        r"arr_0 is uint8 \[2, 4, 4\], not uint8 \[M, H, W, 3\]",
    ),
    "empty array": (
        {"a.npz": npz_of(arr_0=np.zeros((0, 4, 4, 3), np.uint8))},
        "",
        ConfigError,
        r"arr_0 is \[0, 4, 4, 3\], which has no pixels",
    ),
    "cut array": (
        {"a.npz": npz_of(arr_0=PIXELS)[:900]},
        "",
        ConfigError,
        r"a.npz is no array of images \(.npz with arr_0\): File is not a zip file",
    ),
    "two arrays": (
        {"a.npz": b"", "b.npz": b""},
        "",
        ConfigError,
        "holds 2 .npz files, a.npz, b.npz and so on; give one of them",
    ),
    "no image in tars": (
        {"a.tar": tar_of([("a.txt", b"1"), ("a.mp3", b"")])},
        "",
        ConfigError,
        "no images in 1 tars, only 1 .txt, 1 .mp3",
    ),
    "two images of a sample": (
        {"a.tar": tar_of([("0.input.png", b"1"), ("0.target.png", b"")])},
        "",
        ConfigError,
        "sample 0 has two images, 0.input.png and 0.target.png; say which by --column, such as ta",
    ),
    "cut tar": (
        {"a.tar": tar_of([("0.png", FILES[0]), ("1.png", FILES[1] * 99)])[:5000]},
        "",
        ConfigError,
        "a.tar is damaged, truncated or no tar: unexpected end of data",
    ),
    "garbage in a tar": (
        {"a.tar": tar_of([("0.png", FILES[0])])[:1024] + b"garbage" * 300},
        "",
        ConfigError,
        "a.tar is damaged, truncated or no tar: no member at byte 1024",
    ),
    "gzip": (
        {"a.tar": b"\x1f\x8b" + bytes(600)},
        "",
        ConfigError,
        "a.tar is damaged, truncated or no tar: it is gzip data; unpack it first",
    ),
    "all broken": (
        {"a.png": b"", "b.png": FILES[0][:40]},
        "",
        ConfigError,
        "of 2 images looked at 2 cannot be used; a.png is no image but empty",
    ),
    "a file of another kind": ({"a.gif": b"GIF8"}, "/a.gif", ConfigError, "only 1 .gif"),
}


REFUSED_FAR = ("nothing", "no images", "a pattern of nothing", "damaged Parquet", "cut tar")
REFUSED_THERE = [("local", name) for name in REFUSED] + [("s3", name) for name in REFUSED_FAR]


@pytest.mark.parametrize(("place", "name"), REFUSED_THERE, indirect=["place"])
def test_what_is_no_source_is_refused_when_it_is_opened(name: str, place: str) -> None:
    files, tail, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        open_source(write(place, files) + tail)
    assert "\n" not in str(caught.value) and type(caught.value) is kind


def test_a_column_is_chosen_by_its_name(place: str) -> None:
    samples = [
        (f"{i}.{what}.png", FILES[i + k]) for i in range(4) for k, what in ((0, "a"), (6, "b"))
    ]
    tars = write(f"{place}/tars", {"x.tar": tar_of(samples)})
    columns = {"image": struct_column(FILES[:4]), "b.png": FILES[6:10], "text": ["x"] * 4}
    rows = write(f"{place}/rows", {"x.parquet": parquet_of(columns)})
    for uri in (tars, rows):
        chosen = open_source(uri, column="b.png")
        np.testing.assert_array_equal(read(chosen), PIXELS[6:10])
    assert chosen.fingerprint != open_source(rows).fingerprint
    for column, message in [
        ("c", r"has no column 'c'; it has image \("),
        ("text", "column 'text' is string; image files are needed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_source(rows, column=column)
    with pytest.raises(ConfigError, match="column='x' is of Parquet files and WebDatasets, and"):
        open_source(write(f"{place}/files", {"a.png": FILES[0]}), column="x")
    for size in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"size={size} must be a positive integer"):
            open_source(rows, size=size)  # type: ignore[arg-type]


def test_a_set_of_ours_must_be_whole_and_of_images(tmp_path: Path) -> None:
    uri = SOURCES["ours parquet"](str(tmp_path / "set"))
    (tmp_path / "set/shards/shard-00001.parquet").unlink()
    with pytest.raises(ShardError, match="lacks 1 of 3 shards; rerun `ddray generate`"):
        open_source(uri)


def test_a_compressed_array_is_read_once_by_who_reads_on(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(SOURCES["packed npz"](place))
    opened = []
    begun = npz.NpzSource._begun
    monkeypatch.setattr(npz.NpzSource, "_begun", lambda self: opened.append(1) or begun(self))  # type: ignore[func-returns-value]
    for rows in (range(2, 5), range(5, 7), range(9, 13)):
        np.testing.assert_array_equal(read(source, rows), PIXELS[rows.start : rows.stop])
    # Looking at the first image has opened it.
    assert opened == []
    np.testing.assert_array_equal(read(source, range(1, 3)), PIXELS[1:3])
    assert opened == [1]


def test_parts_of_a_name_are_read_from_storage(place: str) -> None:
    storage = open_storage(place)
    storage.write("x", bytes(range(100)))
    assert storage.read_range("x", 10, 5) == bytes(range(10, 15))
    assert storage.read_range("x", 98, 5) == bytes([98, 99])
    assert storage.read_range("x", 100, 5) == storage.read_range("x", 3, 0) == b""
    with pytest.raises(StorageError, match="cannot read .*y: no such"):
        storage.read_range("y", 0, 1)
    with storage.open_file("x", 100, 8) as file:
        assert (file.read(3), file.seek(-2, 2), file.read(9)) == (b"\0\1\2", 98, bytes([98, 99]))
    etag = storage.stamps()["x"].etag
    assert storage.list() == {"x": 100} and bool(etag) == place.startswith("s3")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    images = np.zeros((1000, 128, 128, 3), np.uint8)
    file = encode_png(images[0])
    uris = [
        write(f"{tmp_path}/stored", {"a.npz": npz_of(arr_0=images)}),
        write(f"{tmp_path}/packed", {"a.npz": npz_of(np.savez_compressed, arr_0=images)}),
        write(f"{tmp_path}/rows", {"a.parquet": parquet_of({"image": [file] * 1000}, 1000)}),
        write(f"{tmp_path}/tars", {"a.tar": tar_of([(f"{i}.png", file) for i in range(1000)])}),
    ]
    for uri in uris:
        source = open_source(uri)
        tracemalloc.start()
        try:
            assert sum(1 for _ in source.read(range(1000))) == 1000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 40e6 < images.nbytes, (uri, peak)

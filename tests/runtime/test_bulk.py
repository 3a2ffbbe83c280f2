"""Images in bulk by a pool of actors on a real Ray, in the three formats, from a tiny student."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ddray
from ddray.errors import ConfigError
from ddray.images import ImageSet
from ddray.report import to_uint8
from ddray.runtime.bulk import generate
from tests.runtime.tiny import contents, generating, write_student, write_teacher

pytestmark = pytest.mark.ray

FORMATS = ("parquet", "webdataset", "images")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return write_student(folder / "student", write_teacher(folder / "teacher"))


@pytest.fixture(scope="module")
def sets(
    ray_local: None, student: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same 25 images in every format."""
    folder = tmp_path_factory.mktemp("images")
    for encoding in FORMATS:
        summary = generate(generating(student, folder / encoding, format=encoding, seed=4))
        assert (summary["images"], summary["shards_made"], summary["format"]) == (25, 3, encoding)
    return {encoding: folder / encoding for encoding in FORMATS}


def _images(folder: Path, encoding: str) -> dict[int, tuple[int, bytes]]:
    """Index -> class and PNG bytes."""
    found: dict[int, tuple[int, bytes]] = {}
    for shard in sorted((folder / "shards").iterdir()):
        if encoding == "parquet":
            rows = pq.read_table(shard).to_pylist()
            found |= {row["index"]: (row["label"], row["png"]) for row in rows}
        elif encoding == "webdataset":
            with tarfile.open(shard) as archive:
                files = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
            names = {name.partition(".")[0] for name in files}
            found |= {int(n): (int(files[f"{n}.cls"]), files[f"{n}.png"]) for n in names}
        else:
            for name in json.loads(shard.read_text()):
                index, _, label = Path(name).stem.partition("-")
                found[int(index)] = int(label), (folder / name).read_bytes()
    return found


def test_every_format_holds_the_same_images(sets: dict[str, Path]) -> None:
    images = {encoding: _images(folder, encoding) for encoding, folder in sets.items()}
    assert sorted(images["parquet"]) == list(range(25))
    assert images["parquet"] == images["webdataset"] == images["images"]
    assert [images["parquet"][i][0] for i in range(25)] == [i % 10 for i in range(25)]
    assert len({png for _, png in images["parquet"].values()}) > 20


def test_images_are_those_of_the_student(sets: dict[str, Path], student: str) -> None:
    model = ddray.load_student(student, device="cpu")
    codes = model.generate([i % 10 for i in range(25)], seed=4)
    expected = to_uint8(model.decode(codes).numpy())
    for i, (_, png) in _images(sets["parquet"], "parquet").items():
        pixels = np.asarray(Image.open(io.BytesIO(png)), dtype=int)
        # One level: this reference ran as a batch of 25.
        assert np.abs(pixels - expected[i].astype(int)).max() <= 1


@pytest.mark.parametrize("encoding", ["webdataset", "images"])
def test_a_rerun_brings_a_deleted_shard_back_byte_for_byte(
    sets: dict[str, Path], student: str, encoding: str
) -> None:
    folder = sets[encoding]
    before = contents(folder, "shards", "images")
    shards = ImageSet.open(str(folder))
    first = folder / shards.plan.shard_name(0)
    time = first.stat().st_mtime_ns
    (folder / shards.plan.shard_name(1)).unlink()
    summary = generate(generating(student, folder, format=encoding, seed=4))
    assert (summary["shards_made"], summary["rows_made"]) == (1, 10)
    assert contents(folder, "shards", "images") == before
    assert first.stat().st_mtime_ns == time


def test_a_finished_set_is_not_made_again(sets: dict[str, Path], student: str) -> None:
    summary = generate(generating(student, sets["parquet"], seed=4))
    assert (summary["shards_made"], summary["rows_per_s"]) == (0, None)


def test_another_plan_at_the_uri_is_refused_with_what_differs(
    sets: dict[str, Path], student: str
) -> None:
    with pytest.raises(
        ConfigError, match="another plan .seed: 4 there, 5 now; schedule: '0' there"
    ):
        generate(generating(student, sets["parquet"], seed=5, schedule="0,8"))
    with pytest.raises(ConfigError, match="encoding: 'parquet' there, 'images' now"):
        generate(generating(student, sets["parquet"], seed=4, format="images"))


def test_a_schedule_that_does_not_fit_is_refused(student: str, tmp_path: Path) -> None:
    for schedule in ("0,99", "8", "0,teacher:2-4,4"):
        with pytest.raises(ConfigError, match="schedule"):
            generate(generating(student, tmp_path / "set", schedule=schedule))
        assert not (tmp_path / "set").exists()

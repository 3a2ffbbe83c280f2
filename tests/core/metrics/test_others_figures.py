"""Facts about our figures beside those of the tools of the field, on the same features or files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddray.metrics.frechet import FeatureStatistics, FeatureSums
from ddray.metrics.inception import Inception
from ddray.metrics.inception_score import ScoreSums, fidelity_splits
from ddray.metrics.kid import kernel_distance
from ddray.metrics.measurement import Measurement, ShardFeatures
from ddray.metrics.network import LOGITS, POOL
from ddray.metrics.precision_recall import compare_manifolds
from ddray.metrics.reference import Reference
from ddray.sets.images.image_set import SAMPLES
from tests.core.metrics.test_networks import inception_file, photographs  # noqa: F401
from tests.core.sets.images.test_image_set import write
from tests.patience import PATIENCE_S


def some_features(count, size, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(size, size))
    return np.maximum(rng.normal(size=(count, size)) @ mixing + shift, 0).astype(np.float32)


@pytest.mark.slow  # scipy and torchvision take a second to import
def test_the_distance_is_that_of_pytorch_fid():
    scipy = pytest.importorskip("scipy")
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("pytorch-fid 0.3.0 calls sqrtm with an argument that this SciPy lacks")
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = (
        FeatureStatistics.from_features(torch.from_numpy(some_features(500, 40, k, k / 2)))
        for k in range(2)
    )
    theirs = calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert a.distance(b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_figures_of_the_same_features_are_those_of_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    samples, real = some_features(300, 20, 0), some_features(250, 20, 1, 0.3)
    ours, theirs = torch.from_numpy(samples), torch.from_numpy(real)
    quiet = {"verbose": False}

    manifolds = compare_manifolds(samples, real)
    prc = metric_prc.prc_features_to_metric(ours, theirs, **quiet)
    assert manifolds.precision == pytest.approx(prc["precision"], rel=1e-6)
    assert manifolds.recall == pytest.approx(prc["recall"], rel=1e-6)

    subsets = {"kid_subsets": 5, "kid_subset_size": 100}
    kid = metric_kid.kid_features_to_metric(ours, theirs, **subsets, **quiet)
    found = kernel_distance(samples, real, subsets=5, subset_size=100)
    assert found == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-4)

    isc = metric_isc.isc_features_to_metric(ours)
    score = ScoreSums.of(ours, fidelity_splits(300), 10).score()
    assert score == pytest.approx(isc["inception_score_mean"], rel=1e-6)

    stats = [metric_fid.fid_features_to_statistics(rows.double()) for rows in (ours, theirs)]
    fid = metric_fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    a, b = FeatureStatistics.from_features(ours), FeatureStatistics.from_features(theirs)
    assert a.distance(b) == pytest.approx(fid, rel=1e-6)


class Packed(torch.utils.data.Dataset):
    """The images of our npz, as torch-fidelity takes what lies in no folder."""

    def __init__(self, folder):
        self.images = torch.from_numpy(np.load(folder / SAMPLES)["arr_0"]).movedim(3, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        return self.images[k]


def write_folder(folder, images):
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{k:06d}.png")
    return str(folder)


@pytest.mark.chaos  # half a minute of Inception
def test_statistics_are_those_of_the_command_of_pytorch_fid(tmp_path, inception_file):  # noqa: F811
    images = photographs(6, (32, 32))
    write(tmp_path / "set", images.numpy(), encoding="flat", count=len(images))
    folder = str(tmp_path / "set" / "images")
    place = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.symlink_to(inception_file)
    told = ["--save-stats", "--device", "cpu", "--batch-size", "6", "--num-workers", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytorch_fid", *told, folder, str(tmp_path / "theirs.npz")],
        env={**os.environ, "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = Reference.load(str(tmp_path / "theirs.npz")).statistics[POOL]
    network = Inception(inception_file, any_weights=True)
    ours = FeatureSums.of(network(images)[POOL]).statistics()
    spread = np.trace(theirs.covariance)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-4, atol=1e-4)
    assert np.abs(ours.covariance - theirs.covariance).max() < 1e-4 * spread
    assert np.trace(ours.covariance) == pytest.approx(spread, rel=1e-4)


@pytest.mark.chaos
@pytest.mark.parametrize("encoding", ["flat", "npz"])
def test_torch_fidelity_says_of_our_sets_what_we_say(tmp_path, inception_file, encoding):  # noqa: F811
    torch_fidelity = pytest.importorskip("torch_fidelity")
    made, real = photographs(12, (32, 32)), photographs(11, (32, 32), seed=1)
    write(tmp_path / "made", made.numpy(), encoding=encoding, count=len(made))
    place = tmp_path / "made"
    theirs = torch_fidelity.calculate_metrics(
        input1=Packed(place) if encoding == "npz" else str(place / "images"),
        input2=write_folder(tmp_path / "real", real),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        feature_extractor="inception-v3-compat",  # or precision and recall are of a VGG-16
        feature_extractor_weights_path=str(inception_file),
        kid_subset_size=10,
        kid_subsets=5,
        batch_size=6,
        cuda=False,
        cache=False,
        verbose=False,
    )
    network = Inception(inception_file, resize="tensorflow", any_weights=True)
    features = network(real)[POOL]
    statistics = FeatureSums.of(features).statistics()
    shard = ShardFeatures.of(network, made, 0, (POOL, LOGITS))
    measurement = Measurement(
        ("fid", "is", "precision", "recall"),
        len(made),
        Reference("real", {POOL: statistics}),
        features.numpy(),
        splits="torch-fidelity",
    )
    measurement.add(shard)
    ours = measurement.results()
    kid = kernel_distance(shard.layers[POOL], features.numpy(), subsets=5, subset_size=10)
    near = {"rel": 1e-3}
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], **near)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], **near)
    assert ours["precision"] == pytest.approx(theirs["precision"], **near)
    assert ours["recall"] == pytest.approx(theirs["recall"], **near)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], **near)

"""Facts about the Frechet distance: closed forms, symmetry, and too few images."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ddray
from ddray.errors import ConfigError
from ddray.metrics.digits_classifier import NUM_FEATURES, DigitsClassifier
from ddray.metrics.fd_digits import classify
from ddray.metrics.frechet import FeatureStatistics, FeatureSums


def gaussian(mean, covariance):
    return FeatureStatistics(100, np.array(mean, float), np.array(covariance, float))


def random_gaussian(seed, size=6):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    return gaussian(rng.normal(size=size), root @ root.T)


def test_the_distance_in_one_dimension():
    # (m1 - m2)^2 + (s1 - s2)^2
    a, b = gaussian([1.0], [[4.0]]), gaussian([4.0], [[25.0]])
    assert a.distance(b) == pytest.approx(9 + 9)


def test_it_is_a_function_of_two_means_and_covariances():
    a, b = random_gaussian(0), random_gaussian(1)
    assert ddray.metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance) == a.distance(
        b
    )


def test_the_distance_of_axis_aligned_gaussians():
    a = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([1, 2, 2], np.diag([16.0, 4.0, 0.0]))
    assert a.distance(b) == pytest.approx(9 + 9 + 0 + 9)


def test_the_distance_of_commuting_covariances_is_that_of_their_roots():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a = gaussian([0] * 3, rotation @ np.diag([1.0, 4.0, 9.0]) @ rotation.T)
    b = gaussian([0] * 3, rotation @ np.diag([4.0, 1.0, 25.0]) @ rotation.T)
    assert a.distance(b) == pytest.approx(1 + 1 + 4)


def test_the_distance_loses_no_digits_where_features_outnumber_images():
    # Of rank one, in 40 dimensions: tr (u u^T v v^T)^(1/2) = |u . v|.
    u, v = np.random.default_rng(0).normal(size=(2, 40))
    a, b = gaussian(u, np.outer(u, u)), gaussian(u, np.outer(v, v))
    assert a.distance(b) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)


def test_the_distance_to_itself_is_zero():
    a = random_gaussian(1)
    assert a.distance(a) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_symmetric_and_positive():
    a, b = random_gaussian(1), random_gaussian(2)
    assert a.distance(b) == pytest.approx(b.distance(a))
    assert a.distance(b) > 0


def test_a_flat_covariance_has_a_distance():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    features[:, 3:] = 0
    a = FeatureStatistics.from_features(features)
    assert a.distance(a) == pytest.approx(0, abs=1e-9)
    moved = FeatureStatistics.from_features(features + 2)
    assert a.distance(moved) == pytest.approx(20, rel=1e-6)


def test_statistics_are_mean_and_unbiased_covariance_in_float64():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics.from_features(features)
    rows = features.double()
    assert statistics.count == 50
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
    np.testing.assert_allclose(statistics.mean, rows.mean(0))
    centred = rows - rows.mean(0)
    np.testing.assert_allclose(statistics.covariance, centred.T @ centred / 49)


def test_statistics_survive_as_tensors():
    statistics = FeatureStatistics.from_features(torch.eye(3))
    tensors = statistics.tensors()
    assert int(tensors["reference.count"]) == 3
    np.testing.assert_array_equal(tensors["reference.mean"].numpy(), statistics.mean)
    np.testing.assert_array_equal(tensors["reference.covariance"].numpy(), statistics.covariance)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(count):
    with pytest.raises(ConfigError, match=f"needs at least 2 images, got {count}"):
        FeatureStatistics.from_features(torch.zeros(count, 4))


def test_images_are_judged_as_eight_bit_pixels():
    torch.manual_seed(0)
    classifier = DigitsClassifier().eval()
    images = torch.rand(20, 1, 28, 28)
    features, classes = classify(classifier, images)
    assert features.shape == (20, NUM_FEATURES)
    assert classes.shape == (20,)
    stored = (images * 255).round().byte().float() / 255
    assert torch.equal(classify(classifier, stored)[0], features)
    beyond = torch.where(images > 0.5, images + 3, images)
    clamped = torch.where(images > 0.5, torch.ones(()), images)
    assert torch.equal(classify(classifier, beyond)[0], classify(classifier, clamped)[0])


def test_sums_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    # A mean far from zero, where raw second moments would lose their digits.
    rows = torch.from_numpy(np.random.default_rng(0).normal(1e6, 1, (500, 4)))
    whole = FeatureStatistics.from_features(rows)
    parts = [FeatureSums.of(part) for part in rows.split([1, 199, 300])]
    merged = FeatureStatistics.merged(parts)
    assert merged.count == 500
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    back = [FeatureSums.from_bytes(part.to_bytes("a" * 64), "a" * 64) for part in parts]
    np.testing.assert_array_equal(FeatureStatistics.merged(back).covariance, merged.covariance)
    (tmp_path / "s.npz").write_bytes(merged.to_bytes(extractor="a" * 64))
    read = FeatureStatistics.load(str(tmp_path / "s.npz"))
    assert read.count == 500
    np.testing.assert_array_equal(read.covariance, merged.covariance)
    # As pytorch-fid reads it.
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file["mu"][:], merged.mean)
    assert merged.to_bytes() == merged.to_bytes()


def test_damaged_and_foreign_sums_are_refused(tmp_path: Path) -> None:
    data = FeatureSums.of(torch.ones(3, 2)).to_bytes("a" * 64)
    with pytest.raises(ConfigError, match="made by another extractor"):
        FeatureSums.from_bytes(data, "b" * 64)
    for damaged in (data[:-1], b"", b"x" * 100):
        with pytest.raises(ConfigError, match="damaged"):
            FeatureSums.from_bytes(damaged, "a" * 64)
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        FeatureStatistics.merged([FeatureSums.of(torch.ones(1, 2))])
    (tmp_path / "s.npz").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="is no file of statistics"):
        FeatureStatistics.load(str(tmp_path / "s.npz"))

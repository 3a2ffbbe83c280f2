"""Metrics of a set of images, from what its shards leave behind.

A shard leaves features in float32 (`ShardFeatures`), which is what a network gives and less than
the sums of their products, as long as a shard has fewer images than a layer has features. One
process adds the shards in their order (`Measurement`): so the bits of every metric are those of the
shards, whatever the number of workers that made them, and whichever was killed and made again.

Shapes: N images, D features of a layer.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from torch import Tensor

from ddray.errors import ConfigError, one_line
from ddray.metrics.caption_agreement import CaptionAgreement, Embed
from ddray.metrics.frechet import FeatureStatistics, FeatureSums, arrays_and_notes
from ddray.metrics.inception_score import SPLITS, ScoreSums
from ddray.metrics.kid import SUBSET_SIZE, kernel_distance
from ddray.metrics.network import LOGITS, POOL, SPATIAL, FeatureNetwork
from ddray.metrics.precision_recall import DENSITY_NEIGHBOUR, compare_manifolds
from ddray.metrics.reference import Reference

Asked = npt.NDArray[np.integer] | Sequence[str] | None
"""Classes int [N], or captions; None where nobody asked for images by anything."""

# Images of each side, below which precision and recall say little: ADM's evaluator takes 10,000.
_ADM_IMAGES = 10_000


class Metric(NamedTuple):
    """What a metric takes.

    Attributes:
        kind: "frechet", "kernel", "manifold", "score", "accuracy", or of captions "agreement" or
            "retrieval".
        network: whose features.
        layer: which of them.
        key: in `summary.json`.
        images: of each set at least.
    """

    kind: str
    network: str
    layer: str
    key: str
    images: int = 2

    @property
    def higher_is_better(self) -> bool:
        """Of scores and shares; the others are distances."""
        return self.kind not in ("frechet", "kernel")


_MANIFOLD = ("precision", "recall", "density", "coverage")


def _table() -> dict[str, Metric]:
    metrics = {
        "fid": Metric("frechet", "inception", POOL, "fid"),
        "sfid": Metric("frechet", "inception", SPATIAL, "sfid"),
        "is": Metric("score", "inception", LOGITS, "inception_score"),
        "kid": Metric("kernel", "inception", POOL, "kid", SUBSET_SIZE),
    }
    for network in ("inception", "efficientnet", "dinov2", "clip", "digits"):
        # A bare name is that of Inception, as in papers.
        suffix = "" if network == "inception" else f"_{network}"
        if suffix:
            metrics[f"fd{suffix}"] = Metric("frechet", network, POOL, f"fd{suffix}")
            metrics[f"kd{suffix}"] = Metric("kernel", network, POOL, f"kd{suffix}", SUBSET_SIZE)
        for name in _MANIFOLD:
            key = f"{name}{suffix}"
            metrics[key] = Metric("manifold", network, POOL, key, DENSITY_NEIGHBOUR + 1)
    metrics["class_accuracy"] = Metric("accuracy", "digits", LOGITS, "class_accuracy", 1)
    for network in ("clip", "emoji"):
        metrics[f"{network}_score"] = Metric("agreement", network, POOL, f"{network}_score", 1)
        key = f"retrieval_{network}"
        metrics[key] = Metric("retrieval", network, POOL, key, 1)
    return metrics


METRICS = _table()
OF_CAPTIONS = ("agreement", "retrieval")
"""Kinds of metrics that take the captions that images were asked for by."""
ALONE = ("score", "accuracy", *OF_CAPTIONS)
"""Kinds of metrics that take no real images."""


def check_metrics(
    names: Collection[str], network: str, count: int, reference: Reference | None
) -> None:
    """Refuse metrics that cannot come out, before anything is computed.

    Args:
        names: of METRICS.
        network: name of the feature network.
        count: images to judge.
        reference: of real images; None if there is none.

    Raises:
        ConfigError: for an unknown metric, one of another network, one that the reference cannot
            serve, or too few images.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"metric {name!r} is not one of {', '.join(METRICS)}")
        metric = METRICS[name]
        if metric.network != network.partition("-")[0]:
            raise ConfigError(f"{name} is defined on features of {metric.network}, not {network}")
        if count < metric.images:
            raise ConfigError(
                f"{name} takes at least {metric.images} images, and there are {count}"
            )
        if metric.kind in ALONE:
            continue
        if reference is None:
            raise ConfigError(f"{name} compares with real images; give their reference")
        frechet = metric.kind == "frechet"
        reason = reference.lacks(
            metric.layer if frechet else None, images=0 if frechet else metric.images
        )
        if reason:
            raise ConfigError(f"{reference.uri} cannot serve {name}: {reason}")


@dataclass(frozen=True)
class ShardFeatures:
    """Features of consecutive images.

    Attributes:
        first: index of the first image.
        layers: float32 [N, D] by layer.
        broken: index, name and reason of images in between that could not be read; they have no
            row.
    """

    first: int
    layers: Mapping[str, npt.NDArray[np.float32]]
    broken: tuple[tuple[int, str, str], ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))

    @property
    def end(self) -> int:
        """Index behind the last image."""
        return self.first + len(self) + len(self.broken)

    @classmethod
    def of(
        cls, network: FeatureNetwork, images: Tensor, first: int, layers: Collection[str]
    ) -> "ShardFeatures":
        """Features of a shard.

        Args:
            network: the extractor.
            images: uint8 [N, H, W, 3] or [N, 3, H, W], N >= 1.
            first: index of the first image.
            layers: what is kept.
        """
        found = network(images)
        return cls(first, {name: found[name].cpu().numpy() for name in sorted(layers)})

    def to_bytes(self, extractor: str) -> bytes:
        """As a safetensors file.

        Args:
            extractor: fingerprint of what made the features.
        """
        # In one entry: safetensors writes several in an order of its own every time.
        notes: dict[str, Any] = {"extractor": extractor, "first": self.first}
        if self.broken:
            notes["broken"] = self.broken
        return save(dict(self.layers), {"shard": json.dumps(notes)})

    @classmethod
    def from_bytes(cls, data: bytes, extractor: str) -> "ShardFeatures":
        """Read what `to_bytes` made.

        Raises:
            ConfigError: if it is damaged, or of another extractor.
        """
        try:
            layers, header = arrays_and_notes(data)
            notes = json.loads(header["shard"])
            first, found = int(notes["first"]), str(notes["extractor"])
            broken = tuple(
                (int(i), str(name), str(why)) for i, name, why in notes.get("broken", ())
            )
            if not layers or len({len(rows) for rows in layers.values()}) != 1:
                raise ValueError("its layers have other numbers of images")
            if not all(np.isfinite(rows).all() for rows in layers.values()):
                raise ValueError("its features are not all finite numbers")
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"damaged ({one_line(error)})") from error
        if found != extractor:
            raise ConfigError(f"made by another extractor ({found[:12]}, not {extractor[:12]})")
        return cls(first, layers, broken)


class Measurement:
    """Metrics of images that come shard by shard, in order; memory does not grow with their number.

    Only kernel distances, precision and its like keep a float32 row of every image.

    Args:
        metrics: names of METRICS, all of one network.
        count: images that there will be.
        reference: of real images; None where no metric takes one.
        reference_features: pooled features float [M, D] of real images
            (`Reference.pool_features`), where a metric takes them.
        splits: of the Inception Score, "adm" or "torch-fidelity".
        embed: of captions, by the network of the metrics; where they take captions.
        device: where distances between images are computed.
    """

    def __init__(
        self,
        metrics: Collection[str],
        count: int,
        reference: Reference | None = None,
        reference_features: npt.NDArray[np.floating] | None = None,
        *,
        splits: str = "adm",
        embed: Embed | None = None,
        device: str | torch.device = "cpu",
    ):
        self.metrics = {name: METRICS[name] for name in metrics}
        self.count, self.done, self._next = count, 0, 0
        self.reference, self._real, self._device = reference, reference_features, device
        kinds = {metric.kind for metric in self.metrics.values()}
        self._sums: dict[str, FeatureSums | None] = {
            metric.layer: None for metric in self.metrics.values() if metric.kind == "frechet"
        }
        self._statistics: dict[str, FeatureStatistics] = {}
        self._keeps_rows = bool(kinds & {"kernel", "manifold"})
        self._rows: list[npt.NDArray[np.float32]] = []
        self._splits = SPLITS[splits](count) if "score" in kinds else None
        self._score: ScoreSums | None = None
        self._judges_classes, self._right = "accuracy" in kinds, 0
        self._agreement = CaptionAgreement(embed) if embed and kinds & {*OF_CAPTIONS} else None

    @property
    def layers(self) -> set[str]:
        """Those that shards must have."""
        return {metric.layer for metric in self.metrics.values()}

    def add(self, shard: ShardFeatures, asked: Asked = None) -> None:
        """Take the next shard.

        Args:
            shard: whose first image is the one behind all before.
            asked: what each image was asked for by [N], where a metric takes it: classes as
                integers, or captions.

        Raises:
            ConfigError: for any but the next: no image may be missing or count twice.
        """
        if shard.first != self._next or self.done + len(shard) > self.count:
            raise ConfigError(
                f"images {shard.first} to {shard.end - 1} are not the next: "
                f"{self.done} of {self.count} are there"
            )
        self._next = shard.end
        if not len(shard):
            return
        for layer, sums in self._sums.items():
            own = FeatureSums.of(torch.from_numpy(shard.layers[layer]))
            self._sums[layer] = own if sums is None else sums + own
        if self._keeps_rows:
            self._rows.append(shard.layers[POOL])
        if self._splits is not None:
            ids = self._splits[self.done : self.done + len(shard)]
            num_splits = int(self._splits.max()) + 1
            logits = torch.from_numpy(shard.layers[LOGITS])
            own_score = ScoreSums.of(logits, ids, num_splits)
            self._score = own_score if self._score is None else self._score + own_score
        if self._judges_classes:
            if asked is None:
                raise ConfigError("class_accuracy takes the classes that images were asked for by")
            self._right += int((shard.layers[LOGITS].argmax(1) == asked).sum())
        if self._agreement is not None:
            if asked is None:
                raise ConfigError("agreement takes the captions that images were asked for by")
            self._agreement.add(shard.layers[POOL], [*map(str, asked)])
        self.done += len(shard)

    def results(self) -> dict[str, float]:
        """The metrics, by their keys.

        Raises:
            ConfigError: if images are missing: fewer than were asked for is an error, no number.
        """
        if self.done != self.count:
            raise ConfigError(f"{self.done} of {self.count} images are there")
        found: dict[str, float] = {}
        rows = np.concatenate(self._rows) if self._rows else None
        manifolds = None
        for name, metric in self.metrics.items():
            if metric.kind == "frechet":
                assert self.reference is not None
                found[metric.key] = self.reference.statistics[metric.layer].distance(
                    self._statistics_of(metric.layer)
                )
            elif metric.kind == "score":
                assert self._score is not None
                found[metric.key] = self._score.score()
            elif metric.kind == "accuracy":
                found[metric.key] = self._right / self.done
            elif metric.kind in OF_CAPTIONS:
                found[metric.key] = self._agreements[metric.kind]
            else:
                assert rows is not None and self._real is not None
                if metric.kind == "kernel":
                    found[metric.key] = kernel_distance(rows, self._real)
                    continue
                if manifolds is None:
                    manifolds = compare_manifolds(rows, self._real, device=self._device)
                found[metric.key] = getattr(manifolds, name.partition("_")[0])
        return found

    @cached_property
    def _agreements(self) -> dict[str, float]:
        assert self._agreement is not None
        return self._agreement.results()

    def _statistics_of(self, layer: str) -> FeatureStatistics:
        """Of all images; the sums are dropped, which are as large."""
        sums = self._sums.pop(layer, None)
        if sums is not None:
            self._statistics[layer] = sums.statistics()
        return self._statistics[layer]

    def warnings(self) -> list[str]:
        """What a reader of the numbers should know of the number of images."""
        said = []
        for layer, moments in (self._sums | self._statistics).items():
            if moments is not None and self.count <= len(moments.mean):
                said.append(
                    f"{self.count} images for {len(moments.mean)} {layer} features: the covariance "
                    "is singular and the distance too large; compare it only at the same count"
                )
        few = min(self.count, len(self._real)) if self._real is not None else _ADM_IMAGES
        if few < _ADM_IMAGES and any(m.kind == "manifold" for m in self.metrics.values()):
            said.append(
                f"precision and recall of {few} images; published ones take {_ADM_IMAGES} real "
                "images at least"
            )
        return said

"""From features to figures: every metric of every row, and the classes a row is worst at.

Shapes: N images, D features, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddray.errors import ConfigError
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.generators import Generators
from ddray.evaluation.judges import Judge
from ddray.evaluation.making import load_extractor
from ddray.evaluation.plan import SOURCES, Extractor, Generator, Kind
from ddray.metrics.caption_agreement import Embed
from ddray.metrics.frechet import FeatureStatistics, FeatureSums, add_layers
from ddray.metrics.measurement import METRICS, OF_CAPTIONS, Measurement, ShardFeatures
from ddray.metrics.network import POOL, SPATIAL
from ddray.metrics.reference import Reference

_WORST = 10
_NAMED = 3


def refuse_broken(features: FeatureSet, skip: bool) -> dict[str, int]:
    """Images of sources that could not be read, by generator.

    Args:
        features: an evaluation that is whole.
        skip: whether they are left out.

    Raises:
        ConfigError: naming the first of them, if they are not.
        ShardError: if features are missing or damaged.
    """
    found: dict[str, list[tuple[int, str, str]]] = {}
    for generator in features.plan.generators:
        if generator.kind in SOURCES:
            shards = features.shards(generator, features.plan.extractors[0])
            found[generator.name] = [image for shard in shards for image in shard.broken]
    for generator in features.plan.generators:
        broken = found.get(generator.name, [])
        if not broken:
            continue
        named = "; ".join(f"{name} {reason}" for _, name, reason in broken[:_NAMED])
        more = " ..." if len(broken) > _NAMED else ""
        if not skip:
            raise ConfigError(
                f"{len(broken)} of {generator.count} images of {generator.settings['source']} "
                f"cannot be judged: {named}{more}; mend them, or leave them out by --skip-broken"
            )
        if len(broken) == generator.count:
            raise ConfigError(f"no image of {generator.settings['source']} can be read: {named}")
    return {name: len(broken) for name, broken in found.items() if broken}


def measured_reference(
    features: FeatureSet, judge: Judge
) -> tuple[Reference | None, npt.NDArray[np.floating] | None]:
    """What a judge compares with: statistics, and features float [M, D] where metrics take some.

    Raises:
        ShardError: if features are missing or damaged.
    """
    reference = judge.reference
    if reference is None or judge.measured is None:
        return reference, reference.features if reference is not None else None
    kinds = {METRICS[name].kind for name in judge.metrics}
    sums: dict[str, FeatureSums] = {}
    rows = []
    for shard in features.shards(judge.measured, judge.extractor):
        if not len(shard):
            continue
        if kinds & {"kernel", "manifold"}:
            rows.append(shard.layers[POOL])
        if reference.statistics or "frechet" not in kinds:
            continue
        layers = {POOL, SPATIAL} & shard.layers.keys()
        add_layers(
            sums, {layer: FeatureSums.of(torch.from_numpy(shard.layers[layer])) for layer in layers}
        )
    if sums:
        statistics = {layer: found.statistics() for layer, found in sums.items()}
        reference = replace(reference, statistics=statistics)
    return reference, np.concatenate(rows) if rows else None


def caption_embeddings(judge: Judge, device: str) -> Embed | None:
    """What embeds captions for a judge's metrics; None where they take no captions.

    Raises:
        ConfigError: if its network is not here, or has other weights than the plan's.
    """
    if not any(METRICS[name].kind in OF_CAPTIONS for name in judge.metrics):
        return None
    network: Any = load_extractor(judge.extractor, device)
    embed: Embed = network.of_captions
    return embed


class ClassMeans:
    """Mean features of each class, of which rows are compared class by class.

    Args:
        classes: that there are.
    """

    def __init__(self, classes: Sequence[int]):
        self.classes = sorted({*classes})
        self._count = np.zeros(len(self.classes), np.int64)
        self._sum: npt.NDArray[np.float64] | None = None
        self._square = np.zeros(len(self.classes))

    def add(self, features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Take features [N, D] of images of some classes [N]."""
        place = np.searchsorted(self.classes, labels)
        rows = features.astype(np.float64)
        if self._sum is None:
            self._sum = np.zeros((len(self.classes), rows.shape[1]))
        np.add.at(self._sum, place, rows)
        np.add.at(self._square, place, np.square(rows).sum(1))
        np.add.at(self._count, place, 1)

    def distances(self, other: "ClassMeans") -> dict[int, float]:
        """Squared distance between the means of each class.

        Of the estimate, what is due to the number of images alone is taken off, so that it is 0 on
        average for images of one distribution, and can fall below it. Classes of fewer than two
        images in one of the rows are left out.
        """
        assert self._sum is not None and other._sum is not None
        found = {}
        for k, number in enumerate(self.classes):
            if min(self._count[k], other._count[k]) < 2:
                continue
            means = [row._sum[k] / row._count[k] for row in (self, other) if row._sum is not None]
            spread = [
                (row._square[k] - row._count[k] * np.square(mean).sum())
                / (row._count[k] * (row._count[k] - 1))
                for row, mean in zip((self, other), means, strict=True)
            ]
            found[number] = float(np.square(means[0] - means[1]).sum() - sum(spread))
        return found

    def count_of(self, number: int) -> int:
        """Images of a class."""
        return int(self._count[self.classes.index(number)])


class Judgement:
    """Every metric of every row.

    Args:
        features: an evaluation that is whole.
        judges: what was prepared.
        generators: tell the classes of images.
        splits: of the Inception Score.
        skip_broken: whether images that cannot be read are left out.
        device: where distances between images are computed.

    Attributes:
        quality: a row of figures each, as `summary.json` has them.
        broken: images that are left out, by generator.
        references: pooled statistics of the real images, by extractor.
        reference_images: how many those are, by extractor; 0 where no file says.

    Raises:
        ConfigError: for broken images, or metrics that cannot come out.
        ShardError: if features are missing or damaged.
    """

    def __init__(
        self,
        features: FeatureSet,
        judges: Sequence[Judge],
        generators: Generators,
        *,
        splits: str,
        skip_broken: bool,
        device: str,
    ):
        self._features, self._generators = features, generators
        self._splits, self._device = splits, device
        self.broken = refuse_broken(features, skip_broken)
        self._means: dict[str, ClassMeans] = {}
        self.quality: list[dict[str, Any]] = []
        rows = [g for g in features.plan.generators if g.kind != "reference"]
        by_row: dict[str, dict[str, Any]] = {row.name: self._begun(row) for row in rows}
        self.references: dict[str, FeatureStatistics] = {}
        self.reference_images: dict[str, int] = {}
        for number, judge in enumerate(judges):
            reference, real = measured_reference(features, judge)
            if reference is not None:
                if POOL in reference.statistics:
                    self.references[judge.extractor.name] = reference.statistics[POOL]
                counts = [found.count for found in reference.statistics.values()]
                held = len(real) if real is not None else 0
                self.reference_images[judge.extractor.name] = max([*counts, 0]) or held
            embed = caption_embeddings(judge, device)
            for row in rows:
                measurement = Measurement(
                    *(judge.metrics, by_row[row.name]["images"], reference, real),
                    splits=splits,
                    embed=embed,
                    device=device,
                )
                for shard, images in self._shards(row, judge.extractor):
                    labels = generators.labels(row, images)
                    # Captions lie in files, perhaps with their features: read where they are used.
                    asked = labels if embed is None else generators.captions(row, images)
                    measurement.add(shard, asked)
                    if not number and labels is not None and POOL in shard.layers:
                        means = self._means.setdefault(row.name, ClassMeans(features.plan.classes))
                        means.add(shard.layers[POOL], labels)
                by_row[row.name] |= measurement.results()
                by_row[row.name]["warnings"] += measurement.warnings()
        self.quality = list(by_row.values())

    def _begun(self, row: Generator) -> dict[str, Any]:
        left_out = self.broken.get(row.name, 0)
        shown = {k: v for k, v in row.settings.items() if k not in ("fingerprint", "column")}
        warnings = [f"{left_out} images that could not be read are left out"] if left_out else []
        return {
            "generator": row.name,
            "kind": row.kind,
            "steps": row.steps,
            "images": row.count - left_out,
            "settings": {k: v for k, v in shown.items() if v is not None},
            "warnings": warnings,
        }

    def _shards(
        self, row: Generator, extractor: Extractor
    ) -> Iterator[tuple[ShardFeatures, range]]:
        for shard in self._features.shards(row, extractor):
            yield shard, range(shard.first, shard.end)

    def worst_classes(self, names: Sequence[str | None]) -> dict[str, list[dict[str, Any]]]:
        """The ten classes of each row whose images are furthest from the teacher's.

        Args:
            names: of classes, by number; empty where there are none.
        """
        teachers = [row["generator"] for row in self.quality if row["kind"] == "teacher"]
        base = self._means.get(next(iter(teachers), ""))
        found: dict[str, list[dict[str, Any]]] = {}
        for row, means in self._means.items():
            if base is None or row in teachers:
                continue
            distances = means.distances(base)
            worst = sorted(distances, key=lambda k: (-distances[k], k))[:_WORST]
            found[row] = [
                {
                    "class": k,
                    "name": names[k] if k < len(names) else None,
                    "distance": distances[k],
                    "images": means.count_of(k),
                }
                for k in worst
            ]
        return {row: worst for row, worst in found.items() if worst}


def add_ratio(quality: Sequence[dict[str, Any]], leading: str, base: Kind = "teacher") -> None:
    """Give each row the ratio of its leading metric, if that is a distance, to the best teacher's.

    Args:
        quality: rows of a `Judgement`.
        leading: key of the metric.
        base: kind of the teacher's row.
    """
    theirs = min((row[leading] for row in quality if row["kind"] == base), default=0)
    is_distance = any(m.key == leading and m.kind == "frechet" for m in METRICS.values())
    for row in quality:
        row["ratio"] = row[leading] / theirs if theirs and is_distance else None

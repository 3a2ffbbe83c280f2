"""Statistics of real images as a file: what it is made from, and how it is put together.

Features are made shard by shard, as those of any source (`making`), in a folder beside the file;
one process adds them up in their order. So the file has the same bytes whoever made the shards, and
whoever was killed on the way.

Shapes: M images that stand in the file, D features of a layer, H and W pixels.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from ddray.config.reference import ReferenceConfig
from ddray.errors import ConfigError, DDRayError, StorageError, one_line
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.judging import refuse_broken
from ddray.evaluation.making import open_planned, source_settings
from ddray.evaluation.plan import EvaluationPlan, Extractor, Generator
from ddray.metrics.frechet import FeatureStatistics, FeatureSums, add_layers
from ddray.metrics.loading import load_network
from ddray.metrics.network import POOL
from ddray.metrics.reference import MOMENTS, Reference
from ddray.progress import Progress
from ddray.sources import BrokenImage, ImageSource, open_source
from ddray.storage import open_beside
from ddray.storage.image_array import npz_chunks

NOTES = "notes"
"""The entry that says how a file was made, as JSON."""
# Features of an image, layer by layer: pooled ones, and those that keep their place. Of DINOv2 and
# CLIP the most that a published size gives.
_FEATURES = {"inception": (2048, 2023), "efficientnet": (1280,), "dinov2": (1536,), "clip": (1280,)}
_NAMED = 5
_PARTS = ".parts"


def prepare(config: ReferenceConfig) -> EvaluationPlan:
    """The plan of a reference's features; what cannot work is refused here, before it starts.

    Raises:
        ConfigError: for no images, fewer than two, weights that are not here or others.
        DDRayError: for a source or weights that cannot be read.
    """
    source = open_images(config)
    network = load_network(config.network, _weights(config), any_weights=config.any_inception)
    layers = tuple(sorted(MOMENTS.keys() & network.layers.keys()))
    options = {"column": config.column, "size": config.size, "convert": config.convert}
    settings = source_settings(source, **options)
    generator = Generator("reference", "reference", source.count, None, settings)
    extractor = Extractor(
        *(network.name, _weights(config), config.any_inception, network.fingerprint, layers)
    )
    return EvaluationPlan(
        generators=(generator,),
        extractors=(extractor,),
        threads=config.threads,
        batch_size=config.batch_size,
        shard_rows=config.shard_rows,
    )


def open_images(config: ReferenceConfig) -> ImageSource:
    """The source of a reference.

    Raises:
        ConfigError: if none is given, or it has fewer than two images.
        DDRayError: if it cannot be read.
    """
    if config.source is None:
        raise ConfigError("reference takes SOURCE, real images: a folder, tars, Parquet or an .npz")
    source = open_source(
        config.source, column=config.column, size=config.size, convert=config.convert
    )
    if source.count < 2:
        raise ConfigError(f"{source.uri} holds one image; statistics take two at least")
    return source


def estimate(config: ReferenceConfig) -> dict[str, Any]:
    """What statistics of real images will read and write, for `--dry-run`.

    Args:
        config: the job; its images are counted.

    Returns:
        Values by name, for people.
    """
    try:
        source = open_images(config)
    except DDRayError as error:
        return {"cost": f"unknown without the images: {one_line(error)}"}
    height, width, _ = source.shape
    held = min(config.images, source.count)
    layers = _FEATURES[config.network.partition("-")[0]]
    features, moments = 4 * sum(layers), 8 * sum(size * (size + 1) for size in layers)
    return {
        "images": f"{source.count} of {source.kind} {source.uri}",
        "shards": -(-source.count // config.shard_rows),
        "megabytes_until_it_is_done": round(source.count * features / 1e6, 1),
        "megabytes_of_the_file": round(
            (moments + held * (height * width * 3 + 2 * layers[0])) / 1e6, 1
        ),
    }


def begun(config: ReferenceConfig, plan: EvaluationPlan) -> FeatureSet | None:
    """The set of features that a reference is made from; None where the file is there already.

    Raises:
        ConfigError: if there is another file of that name.
        StorageError: if the place cannot be written.
    """
    storage, name = open_beside(config.out)
    if storage.exists(name):
        notes = _notes_of(config.out)
        if notes.get("plan") == _identity(config, plan):
            return None
        whose = notes.get("source", "something else")
        raise ConfigError(
            f"{storage.join(name)} is there already, of {whose} or with other settings; choose "
            "another --out, or delete it"
        )
    storage.check_writable()
    return FeatureSet.create(storage.join(f"{name}{_PARTS}"), plan)


def finish(config: ReferenceConfig, features: FeatureSet) -> dict[str, Any]:
    """Put the file together, once all features are there; they are deleted then.

    Returns:
        As `made`.

    Raises:
        ConfigError: for broken images that are not to be left out, or fewer than two others.
        ShardError: if features are missing or damaged.
        StorageError: if images cannot be read, or the file not be written.
    """
    plan = features.plan
    (generator,), (extractor,) = plan.generators, plan.extractors
    with threadpool_limits(plan.threads, user_api="blas"):
        added = _Added(features, config.images)
    if added.broken:
        refuse_broken(features, config.skip_broken)
    if added.count < 2:
        raise ConfigError(f"{added.count} images of {config.source} can be read; two are needed")
    source = open_planned(generator.settings)
    notes = {
        "plan": _identity(config, plan),
        "source": source.uri,
        "kind": source.kind,
        **{key: generator.settings[key] for key in ("fingerprint", "column", "size", "convert")},
        "images_left_out": len(added.broken),
        "first_left_out": [f"{name} {reason}" for _, name, reason in added.broken[:_NAMED]],
    }
    storage, name = open_beside(config.out)
    features_MD = added.features if added.sample else None
    reference = Reference(
        *(storage.join(name), added.statistics(), extractor.fingerprint, extractor.name),
        features_MD,
    )
    arrays = reference.arrays() | {NOTES: np.array(json.dumps(notes))}
    shape = (len(added.sample), *source.shape)
    storage.write_stream(name, npz_chunks(shape, _pixels(source, added.sample), arrays))
    return made(config)


def made(config: ReferenceConfig) -> dict[str, Any]:
    """What stands in a finished file, as JSON values; the features that it was made of go.

    Raises:
        StorageError: if it cannot be read, or they not be deleted.
    """
    storage, name = open_beside(config.out)
    storage.delete_folder(f"{name}{_PARTS}")
    with _opened(config.out) as archive:
        notes = json.loads(str(_read(archive, NOTES)))
        count, features = int(_read(archive, "count")), 0
        layers = {
            layer: len(_read(archive, mean))
            for layer, (mean, _) in MOMENTS.items()
            if f"{mean}.npy" in archive.namelist()
        }
        if "features.npy" in archive.namelist():
            features = len(_read(archive, "features"))
        network, extractor = (str(_read(archive, key)) for key in ("network", "extractor"))
    warnings = [
        f"{count} images for {size} {layer} features: the covariance is singular and distances "
        "too large; compare them only with others of this file"
        for layer, size in layers.items()
        if count <= size
    ]
    notes.pop("plan")
    return {
        "out": storage.join(name),
        "images": count,
        "images_in_file": features,
        "network": network,
        "extractor": extractor,
        "layers": layers,
        **notes,
        "warnings": warnings,
    }


class _Added:
    """The shards of a reference, added up in their order.

    Args:
        features: that are all there.
        images: most that stand in the file.

    Attributes:
        count: images that could be read.
        broken: index, name and reason of the others.
        sample: rows of the source that stand in the file: of evenly spread ones those that could be
            read.
        features: float16 [M, D] of the same.
    """

    def __init__(self, features: FeatureSet, images: int):
        (generator,), (extractor,) = features.plan.generators, features.plan.extractors
        self.count, self.broken = 0, list[tuple[int, str, str]]()
        self.sample = list[int]()
        self._sums: dict[str, FeatureSums] = {}
        number = min(images, generator.count)
        spread = np.array([i * generator.count // number for i in range(number)], np.int64)
        kept = []
        for shard in features.shards(generator, extractor):
            self.broken += shard.broken
            if not len(shard):
                continue
            self.count += len(shard)
            rows = np.setdiff1d(
                np.arange(shard.first, shard.end), [row for row, _, _ in shard.broken]
            )
            wanted = np.isin(rows, spread)
            self.sample += rows[wanted].tolist()
            kept.append(shard.layers[POOL][wanted].astype(np.float16))
            own = {k: FeatureSums.of(torch.from_numpy(found)) for k, found in shard.layers.items()}
            add_layers(self._sums, own)
        self.features = np.concatenate(kept) if kept else np.empty((0, 0), np.float16)

    def statistics(self) -> dict[str, FeatureStatistics]:
        """Mean and covariance of each layer, whose order in a shard may be any."""
        return {layer: self._sums[layer].statistics() for layer in MOMENTS if layer in self._sums}


def _pixels(source: ImageSource, rows: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Images uint8 [H, W, 3] of rows that could be read before."""
    with Progress("images of the file", len(rows), "images") as bar:
        bar.begin()
        for image in source.read(rows):
            if isinstance(image, BrokenImage):
                raise StorageError(f"{source.uri} has changed meanwhile: {image}")
            yield image
            bar.advance_to(bar.done + 1)


def _identity(config: ReferenceConfig, plan: EvaluationPlan) -> str:
    """Of everything that decides the bytes of a file, wherever its weights lie."""
    (extractor,) = plan.extractors
    decided = asdict(replace(plan, extractors=(replace(extractor, source=None),)))
    decided |= {"images": config.images, "skip_broken": config.skip_broken}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def _weights(config: ReferenceConfig) -> str | None:
    return config.inception if config.network.startswith("inception") else config.weights


@contextmanager
def _opened(uri: str) -> Iterator[zipfile.ZipFile]:
    """An .npz of which only parts are read.

    Raises:
        StorageError: if there is none.
    """
    storage, name = open_beside(uri)
    stamp = storage.stamp(name)
    if stamp is None:
        raise StorageError(f"{storage.join(name)} does not exist")
    with closing(storage.open_file(name, stamp.size)) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _read(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(f"{name}.npy") as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)


def _notes_of(uri: str) -> dict[str, Any]:
    """What a file says of how it was made; nothing where it says nothing."""
    try:
        with _opened(uri) as archive:
            notes: dict[str, Any] = json.loads(str(_read(archive, NOTES)))
            return notes
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return {}

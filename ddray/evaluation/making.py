"""What a worker of an evaluation does: images of a row, features of them, and nothing in between.

Images never touch a disk: what the model makes goes to the feature network on the same device.

Shapes: N images of a task, B of a batch, C channels, H and W pixels, D features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.generators import Generators
from ddray.evaluation.plan import SOURCES, Extractor, Task
from ddray.metrics.loading import load_network
from ddray.metrics.measurement import ShardFeatures
from ddray.metrics.network import FeatureNetwork
from ddray.progress import Progress
from ddray.sources import BrokenImage, ImageSource, open_source

T = TypeVar("T")
R = TypeVar("R")

_Features = dict[str, dict[str, npt.NDArray[np.float32]]]


class Batches(Protocol):
    """Work on the device, batch by batch, in order: here, or on a thread of its own."""

    def __call__(self, make: Callable[[T], R], orders: Iterable[T], /) -> Iterator[R]:
        """What `make` returns for each order."""


def one_by_one(make: Callable[[T], R], orders: Iterable[T], /) -> Iterator[R]:
    """Work here."""
    yield from map(make, orders)


def load_extractor(extractor: Extractor, device: str) -> FeatureNetwork:
    """The feature network of a plan.

    Raises:
        ConfigError: if it is not here, or has other weights than the plan's.
        CheckpointError: if its weights are damaged.
    """
    network = load_network(
        extractor.name, extractor.source, any_weights=extractor.any_weights, device=device
    )
    if network.fingerprint != extractor.fingerprint:
        raise ConfigError(
            f"{extractor.name} has other weights here (sha256 {network.fingerprint[:12]}) than "
            f"where the evaluation began ({extractor.fingerprint[:12]})"
        )
    return network


class FeatureMaker:
    """Does the tasks of an evaluation on one device.

    Args:
        features: the evaluation.
        device: "cpu" or "cuda".
        generators: its models; None = loaded as they are needed.
        batches: how work gets to the device.
    """

    def __init__(
        self,
        features: FeatureSet,
        device: str,
        generators: Generators | None = None,
        batches: Batches = one_by_one,
    ):
        self._features, self._plan, self._batches = features, features.plan, batches
        self.generators = generators or Generators(features, device)
        self._networks = {e.name: load_extractor(e, device) for e in self._plan.extractors}
        self._sources: dict[str, ImageSource] = {}

    def do(self, k: int) -> int:
        """Do a task, and say of how many images."""
        task = self._plan.tasks[k]
        if task.generator.kind in SOURCES:
            self._features.write(task, self._of_source(task))
        else:
            self._features.write(task, *self._of_model(task))
        return task.last - task.first

    def _of_model(
        self, task: Task
    ) -> tuple[dict[str, ShardFeatures], npt.NDArray[np.unsignedinteger] | None]:
        generator = task.generator
        counted = generator.kind == "transport" and "data" not in self._plan.models
        parts: list[_Features] = []
        tokens: list[npt.NDArray[np.unsignedinteger]] = []

        def make(rows: range) -> tuple[_Features, Tensor]:
            images, content = self.generators.pixels(generator, rows)
            return self._take(task, images), content

        for found, content in self._batches(make, self._plan.batches(task)):
            parts.append(found)
            if counted:
                vocab_size = len(self.generators.teacher.codebook)
                tokens.append(content.cpu().numpy().astype(np.min_scalar_type(vocab_size - 1)))
        return self._joined(task, parts), np.concatenate(tokens) if tokens else None

    def _of_source(self, task: Task) -> dict[str, ShardFeatures]:
        source = self._source(task.generator.settings)
        broken: list[BrokenImage] = []

        def read() -> Iterator[Tensor]:
            held: list[npt.NDArray[np.uint8]] = []
            for image in source.read(range(task.first, task.last)):
                if isinstance(image, BrokenImage):
                    broken.append(image)
                    continue
                held.append(image)
                if len(held) == self._plan.batch_size:
                    yield torch.from_numpy(np.stack(held))
                    held = []
            if held:
                yield torch.from_numpy(np.stack(held))

        parts = list(self._batches(lambda images: self._take(task, images), read()))
        left_out = tuple((image.index, image.name, image.reason) for image in broken)
        return self._joined(task, parts, left_out)

    def _source(self, settings: Mapping[str, Any]) -> ImageSource:
        uri = settings["source"]
        if uri not in self._sources:
            self._sources[uri] = open_planned(settings)
        return self._sources[uri]

    def _take(self, task: Task, images: Tensor) -> _Features:
        """Features of a batch uint8 [B, C, H, W] or [B, H, W, C] by every extractor."""
        found: _Features = {}
        for extractor in self._plan.extractors:
            layers = self._plan.layers(task.generator, extractor)
            network = self._networks[extractor.name]
            given = network(coloured(images, network))
            found[extractor.name] = {name: given[name].cpu().numpy() for name in layers}
        return found

    def _joined(
        self, task: Task, parts: list[_Features], broken: tuple[tuple[int, str, str], ...] = ()
    ) -> dict[str, ShardFeatures]:
        return {
            extractor.name: ShardFeatures(
                task.first,
                {
                    layer: np.concatenate([part[extractor.name][layer] for part in parts])
                    if parts
                    else np.empty((0, self._networks[extractor.name].layers[layer]), np.float32)
                    for layer in self._plan.layers(task.generator, extractor)
                },
                broken,
            )
            for extractor in self._plan.extractors
        }


def fill_here(label: str, features: FeatureSet, maker: FeatureMaker) -> None:
    """Do what is missing of an evaluation in this process, with progress.

    Args:
        label: what is made, for people.
        features: the evaluation.
        maker: does it.
    """
    plan, missing = features.plan, features.missing()
    with Progress(label, plan.count, "images") as bar:
        bar.advance_to(plan.count - sum(len(plan.shard_range(k)) for k in missing))
        bar.begin()
        for k in missing:
            bar.advance_to(bar.done + maker.do(k))


def source_settings(source: ImageSource, **options: Any) -> dict[str, Any]:
    """What a plan says of a source: settings of its generator.

    Args:
        source: opened with the options.
        **options: column, size and convert of `open_source`.
    """
    return {"source": source.uri, "fingerprint": source.fingerprint, **options}


def open_planned(settings: Mapping[str, Any]) -> ImageSource:
    """The source of a generator, as its settings name it.

    Raises:
        ConfigError: if there are other images now than when the evaluation began.
        StorageError: if it cannot be read.
    """
    keys = ("column", "size", "convert")
    source = open_source(settings["source"], **{key: settings[key] for key in keys})
    if source.fingerprint != settings["fingerprint"]:
        raise ConfigError(
            f"{source.uri} has changed since its features were begun; choose another --out"
        )
    return source


def coloured(images: Tensor, network: FeatureNetwork) -> Tensor:
    """Images with as many channels as a network looks at: grey as three equal ones.

    Raises:
        ConfigError: for colour images before a network of grey ones.
    """
    if images.shape[1] == 1 and network.channels == 3:
        return images.expand(-1, 3, -1, -1)
    if images.shape[-1] == 3 and network.channels == 1:
        grey = images[..., :1]
        if not bool((images == grey).all()):
            raise ConfigError(f"{network.name} judges grey images, and these have colours")
        return grey
    return images

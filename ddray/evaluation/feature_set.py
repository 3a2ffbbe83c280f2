"""The features of an evaluation at one URI: what is there, what is missing, what it holds."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError, ShardError
from ddray.evaluation.plan import FEATURES, EvaluationPlan, Extractor, Generator, Task
from ddray.metrics.measurement import ShardFeatures
from ddray.sets.sharded_set import MANIFEST
from ddray.storage import open_storage
from ddray.storage.base import NotFoundError, Storage, read_ahead


class FeatureSet:
    """Reads and writes the features of one plan at one URI. Pickles, so that Ray can ship it.

    Attributes:
        plan: the plan.
        storage: where the features lie.
        kinds: of generators that are made now; None = all.
    """

    def __init__(
        self, storage: Storage, plan: EvaluationPlan, kinds: Collection[str] | None = None
    ):
        self.storage, self.plan, self.kinds = storage, plan, kinds

    @classmethod
    def create(cls, uri: str, plan: EvaluationPlan) -> FeatureSet:
        """Begin an evaluation, or go on with what of it is there.

        Raises:
            StorageError: if the URI cannot be written.
        """
        storage = open_storage(uri)
        storage.write(MANIFEST, plan.to_json().encode())
        return cls(storage, plan)

    @classmethod
    def open(cls, uri: str) -> FeatureSet:
        """What `create` left.

        Raises:
            ShardError: if there is no evaluation.
            StorageError: if it cannot be read.
        """
        storage = open_storage(uri)
        try:
            return cls(storage, EvaluationPlan.from_json(storage.read(MANIFEST)))
        except NotFoundError as error:
            raise ShardError(f"no evaluation at {storage.uri}: it has no {MANIFEST}") from error

    def only(self, kinds: Collection[str]) -> FeatureSet:
        """The same set, of which generators of some kinds are made now."""
        return FeatureSet(self.storage, self.plan, kinds)

    def missing(self) -> list[int]:
        """Tasks that are still to be done, by listing the storage.

        Raises:
            StorageError: if it cannot be listed.
        """
        there = self.storage.list(f"{FEATURES}/")
        return [
            k
            for k, task in enumerate(self.plan.tasks)
            if (self.kinds is None or task.generator.kind in self.kinds)
            and not all(name in there for name in self.plan.names(task))
        ]

    def write(
        self,
        task: Task,
        features: dict[str, ShardFeatures],
        tokens: npt.NDArray[np.unsignedinteger] | None = None,
    ) -> None:
        """Write the features of a task by every extractor, and its tokens before them.

        Raises:
            StorageError: if they cannot be written.
        """
        if tokens is not None:
            self.storage.write(self.plan.tokens_name(task), _npy(tokens))
        for extractor, name in zip(self.plan.extractors, self.plan.names(task), strict=True):
            data = features[extractor.name].to_bytes(extractor.fingerprint)
            self.storage.write(name, data)

    def shards(self, generator: Generator, extractor: Extractor) -> Iterator[ShardFeatures]:
        """Features of all images of a generator, in order.

        Raises:
            ShardError: if some are missing or damaged.
            StorageError: if they cannot be read.
        """
        names = self._names(generator, extractor)
        for name, data in zip(names, read_ahead(self.storage, names), strict=True):
            try:
                if data is None:
                    raise ConfigError("missing")
                yield ShardFeatures.from_bytes(data, extractor.fingerprint)
            except ConfigError as error:
                raise ShardError(
                    f"{self.storage.join(name)}: {error}; delete it and rerun"
                ) from error

    def tokens(self, generator: Generator) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [N, L] of a generator by transport.

        Raises:
            ShardError: if some are missing.
            StorageError: if they cannot be read.
        """
        names = [self.plan.tokens_name(task) for task in self._tasks(generator)]
        parts = []
        for name, data in zip(names, read_ahead(self.storage, names), strict=True):
            if data is None:
                raise ShardError(f"{self.storage.join(name)} is missing; evaluate into another URI")
            parts.append(_array(data))
        return np.concatenate(parts)

    def delete(self) -> None:
        """Delete all features, of rows of earlier plans too.

        Raises:
            StorageError: if they cannot be deleted.
        """
        self.storage.delete_folder(FEATURES)

    def _names(self, generator: Generator, extractor: Extractor) -> list[str]:
        """Files of a generator's features by an extractor, in order."""
        place = self.plan.extractors.index(extractor)
        return [self.plan.names(task)[place] for task in self._tasks(generator)]

    def _tasks(self, generator: Generator) -> list[Task]:
        return [task for task in self.plan.tasks if task.generator == generator]


class HeldFeatures(FeatureSet):
    """Features that nobody comes back to: they are held in memory, and nothing is written."""

    def __init__(self, storage: Storage, plan: EvaluationPlan):
        super().__init__(storage, plan)
        self._held: dict[str, ShardFeatures] = {}

    def write(
        self,
        task: Task,
        features: dict[str, ShardFeatures],
        tokens: npt.NDArray[np.unsignedinteger] | None = None,
    ) -> None:
        """Hold the features of a task by every extractor."""
        for extractor, name in zip(self.plan.extractors, self.plan.names(task), strict=True):
            self._held[name] = features[extractor.name]

    def shards(self, generator: Generator, extractor: Extractor) -> Iterator[ShardFeatures]:
        """Features of all images of a generator, in order."""
        for name in self._names(generator, extractor):
            yield self._held[name]


def _npy(tokens: npt.NDArray[np.unsignedinteger]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tokens, allow_pickle=False)
    return stream.getvalue()


def _array(data: bytes) -> npt.NDArray[np.unsignedinteger]:
    found: npt.NDArray[np.unsignedinteger] = np.load(io.BytesIO(data), allow_pickle=False)
    return found

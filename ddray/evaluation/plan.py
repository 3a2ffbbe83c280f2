"""The plan of an evaluation: whose images, how many, and the features that are taken of them.

A generator is one row of the table: the teacher, a student along a schedule, somebody's images. Its
features lie in files that are named after everything that decides their bytes. So a rerun makes
only what is not there: after a kill, for more images, for one row more. Pure values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ddray import __version__
from ddray.errors import ShardError
from ddray.file_kind import json_value
from ddray.metrics.network import LOGITS
from ddray.sets.labels import label_of

Kind = Literal[
    "reconstruction",
    "teacher",
    "transport",
    "student",
    "skip",
    "independent",
    "masked",
    "samples",
    "reference",
]

# Whose weights, or whose rows, decide a generator's images.
_MADE_OF: Mapping[str, tuple[str, ...]] = {
    "reconstruction": ("teacher",),
    "teacher": ("teacher",),
    "transport": ("teacher", "data"),
    "student": ("student",),
    "skip": ("teacher",),
    "independent": ("teacher", "data"),
    "masked": ("masked",),
}
SOURCES: tuple[Kind, ...] = ("samples", "reference")
"""Kinds whose images are there already."""

FEATURES = "features"
"""Folder of all features, below an evaluation's URI."""

_FORMAT = 1


@dataclass(frozen=True)
class Generator:
    """One row: what makes its images, and how many.

    Attributes:
        name: in tables; no other row has it.
        kind: what makes the images.
        count: of images, N.
        steps: network evaluations in a row that an image takes; None where there is no such number.
        settings: all else that decides the images: guidance, a schedule, a source.
    """

    name: str
    kind: Kind
    count: int
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher writes some stages of a student's schedule."""
        return self.kind == "student" and "teacher" in str(self.settings.get("schedule", ""))


@dataclass(frozen=True)
class Extractor:
    """A feature network, as every worker loads it.

    Attributes:
        name: of `ddray.metrics.loading.NETWORKS`.
        source: file or folder of its weights; None where they lie by themselves.
        any_weights: whether other weights than the published ones are taken.
        fingerprint: sha256 of the weights.
        layers: that metrics need.
    """

    name: str
    source: str | None
    any_weights: bool
    fingerprint: str
    layers: tuple[str, ...]


class Task(NamedTuple):
    """Images first, ..., last - 1 of a generator: what one worker does in one go."""

    generator: Generator
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Everything that a worker must know, and that decides the features.

    Attributes:
        generators: the rows, in the order in which they are made.
        extractors: of features.
        models: name or folder of student, teacher and masked model, and URI of the trajectory set
            `data`, as far as there are any.
        fingerprints: of the same: sha256 of weights, or the set's plan hash.
        conditioning: `class`, `text`, or empty without a model.
        classes: that images are asked for by.
        labels: rule of `ddray.sets.labels` by which a class follows from the index.
        text_encoder: that makes their features; empty where they are given.
        seed: of noise and draws.
        dtype: of the networks.
        decode_dtype: of the decoder.
        threads: of a worker's models on a CPU; results vary with it.
        batch_size: images made together; results vary with it.
        shard_rows: images of a shard.
    """

    generators: tuple[Generator, ...]
    extractors: tuple[Extractor, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    conditioning: Literal["class", "text", ""] = ""
    classes: tuple[int, ...] = ()
    labels: str = "balanced"
    text_encoder: str = ""
    seed: int = 0
    dtype: str = "float32"
    decode_dtype: str = "float32"
    threads: int = 1
    batch_size: int = 64
    shard_rows: int = 500

    @cached_property
    def tasks(self) -> list[Task]:
        """All there is to do, generator by generator."""
        return [
            Task(generator, first, min(first + self.shard_rows, generator.count))
            for generator in self.generators
            for first in range(0, generator.count, self.shard_rows)
        ]

    @property
    def count(self) -> int:
        """Images of all generators."""
        return sum(generator.count for generator in self.generators)

    @property
    def num_shards(self) -> int:
        """Number of the tasks."""
        return len(self.tasks)

    def shard_range(self, k: int) -> range:
        """Images of task k."""
        return range(self.tasks[k].first, self.tasks[k].last)

    def batches(self, task: Task) -> list[range]:
        """A task's images, cut as a model takes them; the last may be short."""
        rows = range(task.first, task.last)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def label(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The class that each image of a model is asked for by."""
        return label_of(self.labels, index, self.classes, self.seed).astype(np.int64)

    def layers(self, generator: Generator, extractor: Extractor) -> tuple[str, ...]:
        """Layers of an extractor that are kept of a generator's images."""
        if generator.kind == "reference":  # nobody scores how sure a network is of real images
            return tuple(layer for layer in extractor.layers if layer != LOGITS)
        return extractor.layers

    def identity(self, generator: Generator) -> dict[str, Any]:
        """Everything that decides a generator's images, beside their number."""
        found: dict[str, Any] = {"kind": generator.kind, "settings": dict(generator.settings)}
        found |= {"batch_size": self.batch_size, "threads": self.threads}
        if generator.kind in SOURCES:
            return found
        made_of = [*_MADE_OF[generator.kind], *["teacher"] * generator.uses_teacher]
        found["fingerprints"] = {name: self.fingerprints.get(name, "") for name in made_of}
        for name in ("conditioning", "classes", "labels", "text_encoder", "seed"):
            found[name] = getattr(self, name)
        return found | {"dtype": self.dtype, "decode_dtype": self.decode_dtype}

    def folder(self, generator: Generator) -> str:
        """Where what is made of a generator lies, below the evaluation's URI."""
        return f"{FEATURES}/{_digest(self.identity(generator))}"

    def names(self, task: Task) -> list[str]:
        """Files of a task's features, one an extractor."""
        return [
            f"{self.folder(task.generator)}/{extractor.name}-"
            f"{_digest([extractor.fingerprint, self.layers(task.generator, extractor)])}/"
            f"{task.first:09d}-{task.last:09d}.safetensors"
            for extractor in self.extractors
        ]

    def tokens_name(self, task: Task) -> str:
        """File of a task's tokens, of which the independent tokens are counted."""
        return f"{self.folder(task.generator)}/tokens/{task.first:09d}-{task.last:09d}.npy"

    def to_json(self) -> str:
        """The manifest."""
        head = {"kind": "evaluation", "format": _FORMAT, "ddray_version": __version__}
        return json.dumps({**head, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> EvaluationPlan:
        """Read a manifest.

        Raises:
            ShardError: if it is none.
        """
        try:
            values = json_value(text)
            if (values.pop("kind"), values.pop("format")) != ("evaluation", _FORMAT):
                raise ValueError("it is of something else")
            values.pop("ddray_version")
            for name, kind in (("generators", Generator), ("extractors", Extractor)):
                values[name] = tuple(kind(**_tupled(part)) for part in values[name])
            return cls(**_tupled(values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"no manifest of an evaluation ({error})") from error


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _digest(values: Mapping[str, Any] | Iterable[Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

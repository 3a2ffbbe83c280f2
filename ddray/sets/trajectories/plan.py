"""The plan of a trajectory set: every setting that decides its bytes, and its size.

Pure values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ddray.sets.plan import SCHEMA_FORMAT, SetPlan, real_number

__all__ = ["SCHEMA_FORMAT", "Plan"]


@dataclass(frozen=True)
class Plan(SetPlan):
    """Everything that determines the rows of a trajectory set.

    Attributes:
        teacher: Zoo name or path.
        teacher_fingerprint: sha256 of the teacher's weights.
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        conditioning: `class` or `text`.
        num_classes: Classes of the teacher; 0 is allowed for text.
        seed: Of the noise, 0 <= seed < 2**63.
        noise_scheme: Name and version of the function from (seed, index) to noise.
        cfg: Guidance; None is off.
        top_k: 0 is off.
        top_p: In (0, 1]; 1 is off.
        temperature: Above 0.
        solver: Of the transport.
        num_evals: Of the transport, resolved: no None.
        dtype: Of the teacher, such as `float32`.
        threads: Threads per actor; BLAS results vary with it.
        count: Rows of the set.
        shard_rows: Rows of a shard.
        batch_size: Rows that the teacher takes at once; results vary with it.
        stages: Tokens of each AR step; their sum is L.
        vocab_size: V; token ids are below it.
        earlier_counts: Counts that the set had before it was extended. Bookkeeping of
            `TrajectorySet.create`: leave it empty.
        classes: Classes that are sampled, in turn; one that stands twice comes twice as
            often. Empty is all, each once.
        text_encoder: Name or folder of what turned captions into features; empty where
            the features were given, and for classes.
    """

    KIND: ClassVar[str] = ""
    WHAT: ClassVar[str] = "trajectory set"
    MADE_BY: ClassVar[str] = "ddray sample"
    MODEL: ClassVar[str] = "teacher"
    LEAST: ClassVar[dict[str, int]] = {**SetPlan.LEAST, "top_k": 0, "num_evals": 1}
    TEXTS: ClassVar[tuple[str, ...]] = (
        "teacher",
        "teacher_fingerprint",
        "tokenizer_fingerprint",
        "noise_scheme",
        "solver",
        "dtype",
    )
    NOT_HASHED: ClassVar[frozenset[str]] = frozenset({"count", "earlier_counts"})
    JOINED_LATER: ClassVar[frozenset[str]] = frozenset({"classes", "text_encoder"})

    teacher: str
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    conditioning: Literal["class", "text"]
    num_classes: int
    seed: int
    noise_scheme: str
    cfg: float | None
    top_k: int
    top_p: float
    temperature: float
    solver: str
    num_evals: int
    dtype: str
    threads: int
    count: int
    shard_rows: int
    batch_size: int
    stages: tuple[int, ...]
    vocab_size: int
    earlier_counts: tuple[int, ...] = field(default=(), compare=False)
    classes: tuple[int, ...] = ()
    text_encoder: str = ""

    def _check_settings(self) -> None:
        if self.cfg is not None:
            self._set("cfg", real_number("cfg", self.cfg, -math.inf, math.inf))
        self._set("top_p", real_number("top_p", self.top_p, 0.0, 1.0))
        self._set("temperature", real_number("temperature", self.temperature, 0.0, math.inf))

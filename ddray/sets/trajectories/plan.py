"""The plan of a trajectory set: every setting that decides its bytes, and its size.

Pure values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ddray.sets.plan import SetPlan, real_number


@dataclass(frozen=True, kw_only=True)
class TrajectoryPlan(SetPlan):
    """Everything that determines the rows of a trajectory set.

    Attributes:
        teacher: Zoo name or path.
        teacher_fingerprint: sha256 of the teacher's weights.
        cfg: Guidance; None is off.
        top_k: 0 is off.
        top_p: In (0, 1]; 1 is off.
        temperature: Above 0.
        solver: Of the transport.
        num_evals: Of the transport, resolved: no None.
        dtype: Of the teacher, such as `float32`.
    """

    KIND: ClassVar[str] = ""
    WHAT: ClassVar[str] = "trajectory set"
    ROWS: ClassVar[str] = "trajectories"
    SHOWN: ClassVar[tuple[str, ...]] = (
        *("teacher", "conditioning", "num_classes", "seed", "cfg", "top_k", "top_p", "temperature"),
        *("solver", "num_evals", "dtype", "threads", "batch_size", "shard_rows", "vocab_size"),
    )
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
    cfg: float | None
    top_k: int
    top_p: float
    temperature: float
    solver: str
    num_evals: int
    dtype: str

    def _check_settings(self) -> None:
        if self.cfg is not None:
            self._set("cfg", real_number("cfg", self.cfg, -math.inf, math.inf))
        self._set("top_p", real_number("top_p", self.top_p, 0.0, 1.0))
        self._set("temperature", real_number("temperature", self.temperature, 0.0, math.inf))

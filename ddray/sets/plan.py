"""The plan of a sharded set: every setting that decides its bytes, and its size.

What plans of trajectories and of images have in common: the cut into shards and batches, what each
row is asked for by, the hash, the manifest. Pure values.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from ddray import __version__
from ddray.errors import ConfigError, ShardError, one_line
from ddray.file_kind import json_value, kind_of
from ddray.sets.labels import label_of

SCHEMA_FORMAT = 1

_UINT16_CODES = 65536


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """What plans of trajectories and of images have in common.

    Attributes:
        tokenizer_fingerprint: sha256 of the tokenizer's weights.
        conditioning: `class` or `text`.
        num_classes: Classes of the model; 0 is allowed for text.
        seed: Of the noise, 0 <= seed < 2**63.
        noise_scheme: Name and version of the function from (seed, index) to noise.
        threads: CPU threads of the model; BLAS results vary with it.
        count: Rows of the set.
        shard_rows: Rows of a shard.
        batch_size: Rows that the model takes at once; results vary with it.
        stages: Tokens of each AR step; their sum is L.
        vocab_size: V; token ids are below it.
        earlier_counts: Counts that the set had before it was extended. Bookkeeping of
            `ShardedSet.create`: leave it empty.
        classes: Classes that are asked for, in turn; one that stands twice comes twice as
            often. Empty is all, each once.
        text_encoder: Name or folder of what turns captions into features; empty where
            the features were given, and for classes.
        format: Number of the format that the set is written in. It is no part of the hash: a set
            goes on in the format that it was begun in.
    """

    KIND: ClassVar[str]
    """Stands in the manifest; that of trajectory sets, which came first, has none."""
    WHAT: ClassVar[str]
    """What a set of such a plan is, for people."""
    ROWS: ClassVar[str]
    """What its rows are."""
    SHOWN: ClassVar[tuple[str, ...]]
    """Settings that say what rows these are."""
    MADE_BY: ClassVar[str]
    """Command that fills it."""
    MODEL: ClassVar[str]
    """What makes the rows: teacher or student."""
    LEAST: ClassVar[dict[str, int]] = {
        "num_classes": 0,
        "seed": 0,
        "threads": 1,
        "count": 1,
        "shard_rows": 1,
        "batch_size": 1,
        "vocab_size": 2,
    }
    """Integer fields and the least value of each."""
    TEXTS: ClassVar[tuple[str, ...]]
    """Fields that must be texts, and not empty."""
    NOT_HASHED: ClassVar[frozenset[str]]
    """What may change while the set stays the same set."""
    FORMATS: ClassVar[tuple[int, ...]] = (SCHEMA_FORMAT,)
    """Formats that are read; new sets are written in the last one."""
    # At its default such a field stands neither in the manifest nor in the hash, so sets that were
    # made before it open as they did, and keep their hash.
    JOINED_LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that joined the format later."""

    tokenizer_fingerprint: str
    conditioning: Literal["class", "text"]
    num_classes: int
    seed: int
    noise_scheme: str
    threads: int
    count: int
    shard_rows: int
    batch_size: int
    stages: tuple[int, ...]
    vocab_size: int
    earlier_counts: tuple[int, ...] = field(default=(), compare=False)
    classes: tuple[int, ...] = ()
    text_encoder: str = ""
    format: int = SCHEMA_FORMAT

    def __post_init__(self) -> None:
        """Refuse what cannot work, and make equal values hash equally (cfg 4 and 4.0).

        Raises:
            ConfigError: Naming the field, its value and what is allowed.
        """
        for name, least in self.LEAST.items():
            self._set(name, _integer(name, getattr(self, name), least))
        for name in self.TEXTS:
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"plan: {name}={getattr(self, name)!r} must be a text")
        if not isinstance(self.text_encoder, str):
            raise ConfigError(f"plan: text_encoder={self.text_encoder!r} must be a text")
        for name, least in (("stages", 1), ("earlier_counts", 1), ("classes", 0)):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)):
                raise ConfigError(f"plan: {name}={values!r} must be a tuple of integers")
            self._set(name, tuple(_integer(name, value, least) for value in values))
        if self.format not in self.FORMATS:
            raise ConfigError(f"plan: format={self.format!r} must be {_either(self.FORMATS)}")
        self._check_settings()
        if self.conditioning not in ("class", "text"):
            raise ConfigError(f"plan: conditioning={self.conditioning!r} must be class or text")
        if self.conditioning == "class" and not self.num_classes:
            raise ConfigError("plan: num_classes=0 must be at least 1 for class conditioning")
        self._check_conditions()
        if not self.stages:
            raise ConfigError("plan: stages=() must hold the token count of each AR step")

    def _check_settings(self) -> None:
        """Refuse what cannot work in the fields of one kind of plan."""

    def _check_conditions(self) -> None:
        if self.conditioning == "class" and self.text_encoder:
            raise ConfigError(
                f"plan: text_encoder={self.text_encoder!r} is for captions; the {self.MODEL} takes "
                "classes"
            )
        if self.conditioning == "text" and self.classes:
            raise ConfigError(
                f"plan: classes={[*self.classes]}, but the {self.MODEL} takes captions"
            )
        wrong = [number for number in self.classes if number >= self.num_classes]
        if wrong:
            raise ConfigError(
                f"plan: classes={[*self.classes]} holds {wrong[0]}; the {self.MODEL}'s classes are "
                f"0 to {self.num_classes - 1}"
            )

    @property
    def hash(self) -> str:
        """Sha256 over the canonical JSON of all fields but those that may change."""
        named = {name: value for name, value in self._items() if name not in self.NOT_HASHED}
        text = json.dumps(named, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def data_files(self) -> str:
        """Pattern of the files that hold the rows, for a reader that knows no ddray."""
        return "shards/*.parquet"

    @property
    def load_options(self) -> dict[str, Any]:
        """What else Hugging Face's `datasets` must be told to load these files."""
        return {}

    @property
    def num_tokens(self) -> int:
        """L, the tokens of a row."""
        return sum(self.stages)

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return -(-self.count // self.shard_rows)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """uint16 where the codebook allows it, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= _UINT16_CODES else "<u4")

    def shard_range(self, k: int) -> range:
        """Return the indices of shard `k`.

        Raises:
            ShardError: If there is no such shard.
        """
        if not 0 <= k < self.num_shards:
            raise ShardError(f"shard {k} does not exist; the plan has 0 to {self.num_shards - 1}")
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.count))

    def batches(self, k: int) -> list[range]:
        """Return the indices of shard `k`, cut as the model takes them; the last may be short.

        Raises:
            ShardError: If there is no such shard.
        """
        rows = self.shard_range(k)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def label(self, index: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Return the class of each index; see `ddray.sets.labels`.

        With the classes in turn every shard and every extension of the set is balanced, up to one
        turn that its end cuts.

        Raises:
            ConfigError: If the model takes text: captions come with the rows.
        """
        if self.conditioning != "class":
            raise ConfigError("plan: conditioning='text' has no class labels; give captions")
        return label_of(self.label_rule, index, self.classes or self.num_classes, self.seed)

    @property
    def label_rule(self) -> str:
        """How classes follow from the index, as `label_of` takes it."""
        return "balanced"

    def shown(self) -> dict[str, Any]:
        """Return the settings that say what rows these are."""
        return {name: getattr(self, name) for name in self.SHOWN}

    def in_format(self, number: int) -> Self:
        """Return the plan as a set of another format has it."""
        return replace(self, format=number)

    def random_choice(self) -> np.random.Generator:
        """Return random numbers for picking examples of the set: two looks at it agree."""
        return np.random.default_rng(int(self.hash[:16], 16))

    def to_json(self) -> str:
        """Return the manifest: the fields, the format, the version of ddray, the plan hash."""
        head = {"format": self.format, "ddray_version": __version__, "plan_hash": self.hash}
        if self.KIND:
            head["kind"] = self.KIND
        return json.dumps({**head, **dict(self._items())}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a manifest.

        Raises:
            ShardError: If it is no manifest, of another format, or its fields or values
                are not those of a plan.
        """
        try:
            values = json_value(text)
        except ValueError as exc:
            data = text.encode(errors="replace") if isinstance(text, str) else text
            raise ShardError(_no_manifest(data, exc)) from exc
        if not isinstance(values, dict) or "format" not in values:
            raise ShardError("not a ddray manifest: it has no field 'format'")
        kind = values.pop("kind", "")
        if kind != cls.KIND:
            raise ShardError(f"it is of a set of {kind or 'trajectories'}, which is no {cls.WHAT}")
        found = values["format"]
        if found not in cls.FORMATS:
            raise ShardError(
                f"format {found!r} is unknown; ddray {__version__} reads format "
                f"{_either(cls.FORMATS)}: use the ddray that wrote it, or make the set again"
            )
        values.pop("ddray_version", None)
        written_hash = values.pop("plan_hash", None)
        known = {item.name for item in fields(cls)}
        unknown = sorted(values.keys() - known)
        absent = sorted(known - cls.JOINED_LATER - values.keys())
        if unknown or absent:
            raise ShardError(f"not a plan: unknown fields {unknown}, absent fields {absent}")
        try:
            plan = cls(**values)
        except ConfigError as exc:
            raise ShardError(str(exc)) from exc
        if plan.hash != written_hash:
            raise ShardError("plan_hash does not fit the fields: it was edited; restore it")
        return plan

    def _items(self) -> list[tuple[str, Any]]:
        named = [(item, getattr(self, item.name)) for item in fields(self)]
        return [
            (item.name, value)
            for item, value in named
            if item.name != "format"
            and not (item.name in self.JOINED_LATER and value == item.default)
        ]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _no_manifest(data: bytes, error: ValueError) -> str:
    kind = kind_of(data)
    if kind is None or not data or "JSON" in kind.name:
        return f"not JSON ({one_line(error)}), so no ddray manifest"
    return f"not JSON but {kind.name}, so no ddray manifest; {kind.advice}"


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number < 2**63:
        raise ConfigError(f"plan: {name}={value!r} must be an integer of at least {least}")
    return number


def real_number(name: str, value: Any, above: float, most: float) -> float:
    """The value as a float.

    Raises:
        ConfigError: If it is no finite number above one bound and at most the other.
    """
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max or not above < value <= most:
        rule = "a finite number"
        rule += f" above {above:g}" if math.isfinite(above) else ""
        rule += f" and at most {most:g}" if math.isfinite(most) else ""
        raise ConfigError(f"plan: {name}={value!r} must be {rule}")
    return float(value)

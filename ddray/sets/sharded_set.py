"""Sharded sets: a plan and its shards at one URI, what is missing, what is damaged.

One implementation of create, extend, resume and verify for sets of trajectories
(ddray.sets.trajectories.trajectory_set) and of images (ddray.sets.images.image_set), which say what
a shard's bytes are.

A set is `manifest.json`, which is its plan, and `shards/shard-00000.parquet` and so on. Shard k
holds the rows of indices [k * shard_rows, (k + 1) * shard_rows), the last one fewer.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

from ddray.errors import ConfigError, ShardError
from ddray.file_kind import json_value
from ddray.sets.plan import SetPlan
from ddray.storage import open_storage
from ddray.storage.base import NotFoundError, Storage, read_ahead

MANIFEST = "manifest.json"
SHARDS = "shards/"

# What the metadata of every shard says, whatever its format.
_HASH_KEY, _SHARD_KEY, _ROWS_KEY = "ddray.plan_hash", "ddray.shard", "ddray.rows_sha256"

_LETTERS_SHOWN = 200

PlanT = TypeVar("PlanT", bound=SetPlan)
RowsT = TypeVar("RowsT")


@dataclass(frozen=True)
class Listing:
    """What one listing of a set's storage shows, without reading a shard.

    Attributes:
        sizes: Shard -> bytes, of the shards that are there.
        missing: Shards that are still to be written.
        unexpected: Names below shards/ that the plan does not have.
    """

    sizes: dict[int, int]
    missing: list[int]
    unexpected: list[str]


@dataclass(frozen=True)
class VerifyReport:
    """What `ShardedSet.verify` found.

    Attributes:
        num_shards: Shards that the plan asks for.
        missing: Shards that do not exist, or that the set's extension made too short.
        damaged: Shard -> reason.
        rows: Sound rows.
        unexpected: Names below shards/ (and images/) that the plan does not have; a reader
            that takes all of them would count their rows too.
    """

    num_shards: int
    missing: list[int]
    damaged: dict[int, str]
    rows: int
    unexpected: list[str]

    @property
    def ok(self) -> bool:
        """Whether every index of the plan is there exactly once."""
        return not (self.missing or self.damaged or self.unexpected)


class ShardedSet(ABC, Generic[PlanT, RowsT]):
    """Reads and writes the shards of one plan at one URI. Pickles, so that Ray can ship it.

    Attributes:
        plan: The plan.
        storage: Where the set lies.
        uri: The same as a URI.
    """

    PLAN: ClassVar[type[SetPlan]]
    # No shard that is whole is shorter.
    LEAST_BYTES: ClassVar[int] = 1

    def __init__(self, storage: Storage, plan: PlanT) -> None:
        """Take what `create` and `open` made sure of; call those instead."""
        self.storage = storage
        self.plan = plan
        self.uri = storage.uri

    @property
    def suffix(self) -> str:
        """Ending of the shards' names."""
        return "parquet"

    def lacking(self) -> list[str]:
        """Return the names, beside those of shards, that a whole set has and this one has not."""
        return []

    def _strays(self) -> list[str]:
        """Names outside of shards/ that the plan does not have."""
        return []

    @abstractmethod
    def _num_rows(self, k: int, data: bytes) -> int | None:
        """Rows that a shard says it has; None if it cannot be read."""

    @abstractmethod
    def _decode(self, k: int, data: bytes) -> RowsT:
        """The rows of a shard.

        Raises:
            ShardError: If they are not those of shard `k`, or damaged.
        """

    @classmethod
    def create(cls, uri: str, plan: PlanT) -> Self:
        """Start a set, go on with one of the same plan, or extend it to a larger count.

        An extension rewrites the manifest only. A last shard that was short now has too
        few rows and counts as missing; all others stay.

        Raises:
            ConfigError: If the set at `uri` has another plan or a larger count.
            ShardError: If `uri` holds something else.
            StorageError: If `uri` cannot be read and written.
        """
        storage = open_storage(uri)
        existing, merged = _planned(storage, plan)
        if existing is None:
            if storage.write(MANIFEST, merged.to_json().encode(), if_absent=True):
                return cls(storage, merged)
            # Another driver was faster: its manifest counts.
            existing, merged = _planned(storage, plan)
        storage.check_writable()
        if existing is None or merged.to_json() != existing.to_json():
            storage.write(MANIFEST, merged.to_json().encode())
        return cls(storage, merged)

    @staticmethod
    def planned(uri: str, plan: PlanT) -> PlanT:
        """Return the plan that `create` would leave at `uri`; raises as it does, writes nothing."""
        return _planned(open_storage(uri), plan)[1]

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open a set for reading, complete or not.

        Raises:
            ShardError: If there is no set at `uri`, or it is not of this format.
            StorageError: If `uri` cannot be read.
        """
        storage = open_storage(uri)
        plan: Any = _read_manifest(storage, cls.PLAN)
        if plan is None:
            raise ShardError(
                f"no {cls.PLAN.WHAT} at {storage.uri}: it has no {MANIFEST}; "
                f"check the URI, or run `{cls.PLAN.MADE_BY}` first"
            )
        return cls(storage, plan)

    def shard_name(self, k: int) -> str:
        """Return the name of shard `k` below the set's URI."""
        return shard_name(k, self.suffix)

    def listing(self) -> Listing:
        """Return what is there and what is not, by listing the storage once.

        Shards appear whole or not at all, so a name in the listing is enough, with one
        exception: a shard that was the last one of an earlier count may still be short.
        Only those, one for each extension, are read, and count as missing unless the
        length that they tell is the plan's. Damage elsewhere is for `verify` to find.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        there = self.storage.list(SHARDS)
        rows = self.plan.shard_rows
        maybe_short = {count // rows for count in self.plan.earlier_counts if count % rows}
        sizes, missing = {}, []
        for k in range(self.plan.num_shards):
            size = there.pop(self.shard_name(k), 0)
            if size < self.LEAST_BYTES or (k in maybe_short and not self._has_all_rows(k)):
                missing.append(k)
            else:
                sizes[k] = size
        return Listing(sizes, missing, list(there))

    def missing(self) -> list[int]:
        """Return the shards that are still to be written; see `listing`.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        return self.listing().missing

    def read_shard(self, k: int) -> RowsT:
        """Return the verified rows of shard `k`.

        Raises:
            ShardError: If the shard is missing, damaged or of another plan.
            StorageError: If it cannot be read.
        """
        where, made_by = self.storage.join(self.shard_name(k)), self.plan.MADE_BY
        try:
            self.plan.shard_range(k)
            return self._decode(k, self.storage.read(self.shard_name(k)))
        except NotFoundError as exc:
            raise ShardError(f"{where} is missing; rerun `{made_by}` to fill it") from exc
        except ShardError as exc:
            if not 0 <= k < self.plan.num_shards:
                raise
            raise ShardError(
                f"{where}: {exc}; delete it and rerun `{made_by}`, "
                f"or run `ddray inspect {self.uri} --repair`"
            ) from exc

    def verify(
        self,
        advance: Callable[[int], None] | None = None,
        look: Callable[[int, RowsT], None] | None = None,
    ) -> VerifyReport:
        """Read every shard and report what is missing, damaged or does not belong.

        Args:
            advance: Told after each shard how many are done, missing ones included.
            look: Shown every sound shard and its rows.

        Raises:
            StorageError: If the storage cannot be listed or read.
        """
        found = self.listing()
        missing, damaged, sound_rows = list(found.missing), {}, 0
        contents = read_ahead(self.storage, map(self.shard_name, found.sizes))
        for done, (k, data) in enumerate(zip(found.sizes, contents, strict=True), 1 + len(missing)):
            if data is None:
                # Deleted since the listing.
                missing.append(k)
            else:
                try:
                    rows = self._decode(k, data)
                except ShardError as exc:
                    damaged[k] = str(exc)
                else:
                    sound_rows += len(self.plan.shard_range(k))
                    if look is not None:
                        look(k, rows)
            if advance is not None:
                advance(done)
        unexpected = [*found.unexpected, *self._strays()]
        return VerifyReport(self.plan.num_shards, sorted(missing), damaged, sound_rows, unexpected)

    def quarantine(self, name: str) -> str:
        """Move a file to quarantine/ and return its new name.

        Of a shard, a gap is left, which a rerun fills.

        Args:
            name: `shard_name(k)`, or one of `VerifyReport.unexpected`.

        Raises:
            StorageError: If it is not there or cannot be moved.
        """
        content = self.storage.read(name)
        # An earlier quarantine's file of that name stays: it may hold somebody's only copy.
        for number in itertools.count():
            suffix = f"-{number}.bad" if number else ".bad"
            moved = f"quarantine/{name.removeprefix(SHARDS)}{suffix}"
            # The copy comes first: a crash in between leaves two files, never none.
            if self.storage.write(moved, content, if_absent=True):
                break
        self.storage.delete(name)
        return moved

    def _has_all_rows(self, k: int) -> bool:
        try:
            found = self._num_rows(k, self.storage.read(self.shard_name(k)))
        except NotFoundError:
            return False
        return found == len(self.plan.shard_range(k))


def shard_name(k: int, suffix: str = "parquet") -> str:
    """Return the name of shard `k` below a set's URI; trajectories lie in Parquet."""
    return f"{SHARDS}shard-{k:05d}.{suffix}"


def stamp(plan: SetPlan, k: int, rows_sha256: str) -> dict[str, str]:
    """What a shard says of itself in its file's metadata: plan, number, hash of the rows."""
    return {_HASH_KEY: plan.hash, _SHARD_KEY: str(k), _ROWS_KEY: rows_sha256}


def check_stamp(plan: SetPlan, k: int, metadata: Mapping[str, str], num_rows: int) -> str:
    """Refuse a shard that says it is another one; the hash that its rows must have.

    Raises:
        ShardError: If it is not ours, of another plan or number, or too short or long.
    """
    if not metadata.keys() >= {_HASH_KEY, _SHARD_KEY, _ROWS_KEY}:
        raise ShardError("not a shard that ddray wrote: its metadata names no plan")
    if metadata[_HASH_KEY] != plan.hash:
        raise ShardError(
            f"it belongs to plan {metadata[_HASH_KEY][:12]}, the set to {plan.hash[:12]}"
        )
    if metadata[_SHARD_KEY] != str(k):
        raise ShardError(f"it is shard {metadata[_SHARD_KEY]}, renamed")
    expected = len(plan.shard_range(k))
    if num_rows != expected:
        raise ShardError(f"it has {num_rows} of {expected} rows")
    return metadata[_ROWS_KEY]


def manifest_kind(uri: str) -> str:
    """The `KIND` of the plan at a URI; that of trajectory sets where it cannot be told.

    Raises:
        StorageError: If the URI cannot be read.
    """
    try:
        values = json_value(open_storage(uri).read(MANIFEST))
    except (NotFoundError, ValueError):
        return ""
    return str(values.get("kind", "")) if isinstance(values, dict) else ""


def _read_manifest(storage: Storage, kind: type[PlanT]) -> PlanT | None:
    try:
        return kind.from_json(storage.read(MANIFEST))
    except NotFoundError:
        return None
    except ShardError as exc:
        raise ShardError(f"{storage.join(MANIFEST)}: {exc}") from exc


def _planned(storage: Storage, plan: PlanT) -> tuple[PlanT | None, PlanT]:
    """The plan of the set that is there, if any, and the one that it should have."""
    existing = _read_manifest(storage, type(plan))
    if existing is not None:
        return existing, _merged(existing, plan.in_format(existing.format), storage.uri)
    if storage.list(SHARDS):
        raise ShardError(
            f"{storage.join('shards')} holds files, but there is no {MANIFEST}; "
            "restore it, delete the shards, or choose another URI"
        )
    return None, replace(plan, earlier_counts=())


def _merged(existing: PlanT, plan: PlanT, uri: str) -> PlanT:
    """Return `plan` as what follows `existing`, from which only what is not hashed may differ."""
    if existing.hash != plan.hash:
        differences = [
            f"{item.name} is {_shown(getattr(existing, item.name))} there and "
            f"{_shown(getattr(plan, item.name))} here"
            for item in fields(plan)
            if item.name not in plan.NOT_HASHED
            and getattr(existing, item.name) != getattr(plan, item.name)
        ]
        article = "an" if plan.WHAT[0] in "aeiou" else "a"
        raise ConfigError(
            f"{uri} holds {article} {plan.WHAT} of another plan: {'; '.join(differences)}. "
            "Choose another URI, or delete that set"
        )
    if plan.count < existing.count:
        raise ConfigError(
            f"count={plan.count} is below the {existing.count} rows of the set at {uri}; "
            f"give a count of at least {existing.count}, or choose another URI"
        )
    earlier = existing.earlier_counts
    if plan.count > existing.count:
        earlier = (*earlier, existing.count)
    return replace(plan, earlier_counts=earlier)


def _shown(value: Any) -> str:
    """A value on part of a line: a thousand names of classes would fill pages."""
    text = repr(value)
    return text if len(text) <= _LETTERS_SHOWN else f"{text[:_LETTERS_SHOWN]} ..."

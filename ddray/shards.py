"""Trajectory sets, format 1: a plan and its shards, what is missing, what is damaged.

Imports from ddray the plan, the shard files, the errors and the storage; no torch.

A set is `manifest.json`, which is its plan (ddray.plan), and `shards/shard-00000.parquet` and so
on. Shard k holds the rows of indices [k * shard_rows, (k + 1) * shard_rows), the last one fewer.
Noise is not stored: it is a function of (seed, index). Legend: N rows of a shard, L tokens each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError, ShardError
from ddray.plan import NOT_HASHED, Plan
from ddray.shard_file import Rows, check_rows, decode, encode, num_rows
from ddray.storage import NotFoundError, Storage, open_storage, read_ahead

_MANIFEST = "manifest.json"
_SHARDS = "shards/"
# No Parquet file is shorter: two magic numbers and the length of the footer.
_LEAST_PARQUET_BYTES = 12


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
    """What `TrajectorySet.verify` found.

    Attributes:
        num_shards: Shards that the plan asks for.
        missing: Shards that do not exist, or that the set's extension made too short.
        damaged: Shard -> reason.
        rows: Sound rows.
        unexpected: Names below shards/ that the plan does not have; a reader that takes
            all of shards/ would count their rows too.
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


class TrajectorySet:
    """Reads and writes the shards of one plan at one URI. Pickles, so that Ray can ship it.

    Attributes:
        plan: The plan.
        storage: Where the set lies.
        uri: The same as a URI.
    """

    def __init__(self, storage: Storage, plan: Plan) -> None:
        """Take what `create` and `open` made sure of; call those instead."""
        self.storage = storage
        self.plan = plan
        self.uri = storage.uri

    @classmethod
    def create(cls, uri: str, plan: Plan) -> TrajectorySet:
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
            if storage.write(_MANIFEST, merged.to_json().encode(), if_absent=True):
                return cls(storage, merged)
            # Another driver was faster: its manifest counts.
            existing, merged = _planned(storage, plan)
        storage.check_writable()
        if existing is None or merged.count != existing.count:
            storage.write(_MANIFEST, merged.to_json().encode())
        return cls(storage, merged)

    @staticmethod
    def planned(uri: str, plan: Plan) -> Plan:
        """Return the plan that `create` would leave at `uri`; raises as it does, writes nothing."""
        return _planned(open_storage(uri), plan)[1]

    @classmethod
    def open(cls, uri: str) -> TrajectorySet:
        """Open a set for reading, complete or not.

        Raises:
            ShardError: If there is no set at `uri`, or it is not of this format.
            StorageError: If `uri` cannot be read.
        """
        storage = open_storage(uri)
        plan = _read_manifest(storage)
        if plan is None:
            raise ShardError(
                f"no trajectory set at {storage.uri}: it has no {_MANIFEST}; "
                "check the URI, or run `ddray sample` first"
            )
        return cls(storage, plan)

    def listing(self) -> Listing:
        """Return what is there and what is not, by listing the storage once.

        Shards appear whole or not at all, so a name in the listing is enough, with one
        exception: a shard that was the last one of an earlier count may still be short.
        Only those, one for each extension, are read, and count as missing unless the
        length in their footer is the plan's. Damage elsewhere is for `verify` to find.

        Raises:
            StorageError: If the storage cannot be listed.
        """
        there = self.storage.list(_SHARDS)
        rows = self.plan.shard_rows
        maybe_short = {count // rows for count in self.plan.earlier_counts if count % rows}
        sizes, missing = {}, []
        for k in range(self.plan.num_shards):
            size = there.pop(shard_name(k), 0)
            if size < _LEAST_PARQUET_BYTES or (k in maybe_short and not self._has_all_rows(k)):
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

    def write_shard(
        self, k: int, index: npt.ArrayLike, label: npt.ArrayLike, tokens: npt.ArrayLike
    ) -> None:
        """Check the rows of shard `k` and commit them, replacing a shard that is there.

        Args:
            k: Which shard.
            index: Integers [N], exactly `plan.shard_range(k)`.
            label: Integers [N] in [0, num_classes), or N captions if the teacher takes text.
            tokens: Integers [N, L] in [0, vocab_size).

        Raises:
            ShardError: If the rows are not those of the plan.
            StorageError: If the shard cannot be written; none is left behind then.
        """
        rows = np.asarray(index), np.asarray(label), np.asarray(tokens)
        try:
            check_rows(self.plan, k, *rows)
        except ShardError as exc:
            raise ShardError(f"shard {k} not written: {exc}") from exc
        self.storage.write(shard_name(k), encode(self.plan, k, *rows))

    def read_shard(self, k: int) -> Rows:
        """Return the verified rows of shard `k`: index [N], label [N], tokens [N, L].

        Index is int64, label int32 (or an object array of captions), tokens uint16 or
        uint32.

        Raises:
            ShardError: If the shard is missing, damaged or of another plan.
            StorageError: If it cannot be read.
        """
        try:
            return self._load(k)
        except NotFoundError as exc:
            raise ShardError(
                f"{self.storage.join(shard_name(k))} is missing; rerun `ddray sample` to fill it"
            ) from exc
        except ShardError as exc:
            if not 0 <= k < self.plan.num_shards:
                raise
            raise ShardError(
                f"{self.storage.join(shard_name(k))}: {exc}; delete it and rerun `ddray sample`, "
                f"or run `ddray inspect {self.uri} --repair`"
            ) from exc

    def rows(self, start: int, stop: int) -> Rows:
        """Return the verified rows of indices [start, stop) from all shards they lie in.

        Raises:
            ShardError: If the range is not within the set, or a shard is missing or damaged.
            StorageError: If a shard cannot be read.
        """
        if not 0 <= start < stop <= self.plan.count:
            raise ShardError(
                f"rows [{start}, {stop}) are not within [0, {self.plan.count}) of {self.uri}"
            )
        parts = []
        for k in range(start // self.plan.shard_rows, (stop - 1) // self.plan.shard_rows + 1):
            first = self.plan.shard_range(k).start
            cut = slice(max(start - first, 0), stop - first)
            parts.append([column[cut] for column in self.read_shard(k)])
        index, label, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
        return index, label, tokens

    def verify(
        self,
        advance: Callable[[int], None] | None = None,
        look: Callable[[int, Rows], None] | None = None,
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
        contents = read_ahead(self.storage, map(shard_name, found.sizes))
        for done, (k, data) in enumerate(zip(found.sizes, contents, strict=True), 1 + len(missing)):
            if data is None:
                # Deleted since the listing.
                missing.append(k)
            else:
                try:
                    rows = decode(self.plan, k, data)
                except ShardError as exc:
                    damaged[k] = str(exc)
                else:
                    sound_rows += len(rows[0])
                    if look is not None:
                        look(k, rows)
            if advance is not None:
                advance(done)
        return VerifyReport(
            self.plan.num_shards, sorted(missing), damaged, sound_rows, found.unexpected
        )

    def quarantine(self, name: str) -> str:
        """Move a file from shards/ to quarantine/ and return its new name.

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
            moved = f"quarantine/{name.removeprefix(_SHARDS)}{suffix}"
            # The copy comes first: a crash in between leaves two files, never none.
            if self.storage.write(moved, content, if_absent=True):
                break
        self.storage.delete(name)
        return moved

    def _load(self, k: int) -> Rows:
        self.plan.shard_range(k)
        return decode(self.plan, k, self.storage.read(shard_name(k)))

    def _has_all_rows(self, k: int) -> bool:
        try:
            found = num_rows(self.storage.read(shard_name(k)))
        except NotFoundError:
            return False
        return found == len(self.plan.shard_range(k))


def shard_name(k: int) -> str:
    """Return the name of shard `k` below the set's URI."""
    return f"{_SHARDS}shard-{k:05d}.parquet"


def _read_manifest(storage: Storage) -> Plan | None:
    try:
        return Plan.from_json(storage.read(_MANIFEST))
    except NotFoundError:
        return None
    except ShardError as exc:
        raise ShardError(f"{storage.join(_MANIFEST)}: {exc}") from exc


def _planned(storage: Storage, plan: Plan) -> tuple[Plan | None, Plan]:
    """The plan of the set that is there, if any, and the one that it should have."""
    existing = _read_manifest(storage)
    if existing is not None:
        return existing, _merged(existing, plan, storage.uri)
    if storage.list(_SHARDS):
        raise ShardError(
            f"{storage.join('shards')} holds files, but there is no {_MANIFEST}; "
            "restore it, delete the shards, or choose another URI"
        )
    return None, replace(plan, earlier_counts=())


def _merged(existing: Plan, plan: Plan, uri: str) -> Plan:
    """Return `existing` with the count of `plan`, which must otherwise be the same."""
    if existing.hash != plan.hash:
        differences = [
            f"{item.name} is {getattr(existing, item.name)!r} there and "
            f"{getattr(plan, item.name)!r} here"
            for item in fields(Plan)
            if item.name not in NOT_HASHED
            and getattr(existing, item.name) != getattr(plan, item.name)
        ]
        raise ConfigError(
            f"{uri} holds a trajectory set of another plan: {'; '.join(differences)}. "
            "Choose another URI, or delete that set"
        )
    if plan.count < existing.count:
        raise ConfigError(
            f"count={plan.count} is below the {existing.count} rows of the set at {uri}; "
            f"give a count of at least {existing.count}, or choose another URI"
        )
    if plan.count == existing.count:
        return existing
    earlier = (*existing.earlier_counts, existing.count)
    return replace(existing, count=plan.count, earlier_counts=earlier)

"""Who in a pool has done how much, from what its actors say with every shard."""

import dataclasses
import json
import math
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from ddray.sets.makers import Maker


@dataclass(frozen=True)
class Done:
    """A shard that an actor has made, and where.

    Attributes:
        shard: its number.
        rows: its rows.
        seconds: the time that it took.
        node: address of the machine.
        actor: id of the actor; one that is restarted keeps it.
        pid: process of the actor; one that is restarted has another.
        busy_s: time that this process has spent on shards so far.
        alive_s: time since its model was loaded.
        made_by: a `Maker` as JSON; empty where the actor does not know who computes.
        encoding_s: of `busy_s`, what went into features of captions.
    """

    shard: int
    rows: int
    seconds: float
    node: str
    actor: str
    pid: int
    busy_s: float
    alive_s: float
    made_by: str = ""
    encoding_s: float = 0.0

    @property
    def maker(self) -> Maker | None:
        """Who made its bits; None if unknown."""
        return Maker(**json.loads(self.made_by)) if self.made_by else None

    def event(self) -> dict[str, Any]:
        """As the log has it: of who made it the device alone, of captions where there are some."""
        values = dataclasses.asdict(self)
        del values["made_by"]
        if not self.encoding_s:
            del values["encoding_s"]
        return {**values, "device": self.maker.device if self.maker else None}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Done":
        """Read a row of the pool's output, whose values are numpy's."""
        return cls(*(item.type(row[item.name]) for item in fields(cls)))  # type: ignore[operator]


@dataclass
class Tally:
    """Sums over the shards that are done.

    Attributes:
        retries: shards that came twice, and processes that took the place of lost ones.
        rows: of all shards.
        began: when the first actor had its model and could work; of the clock of `add`.
        ended: when the last shard came.
    """

    retries: int = 0
    rows: int = 0
    began: float = math.inf
    ended: float = -math.inf
    _seen: set[int] = field(default_factory=set)
    _latest: dict[tuple[str, str, int], Done] = field(default_factory=dict)

    def add(self, done: Done, at: float = 0.0) -> bool:
        """Count a shard; False if it had come before.

        Args:
            done: what its actor says.
            at: when that came, seconds of any steady clock.
        """
        # Word of a shard may take a while to come, so no single one tells when its actor was ready.
        self.began = min(self.began, at - done.alive_s)
        process = (done.node, done.actor, done.pid)
        if process not in self._latest and done.actor in {actor for _, actor, _ in self._latest}:
            self.retries += 1
        # Shards of one process need not arrive in the order in which it made them.
        self._latest[process] = max(self._latest.get(process, done), done, key=attrgetter("busy_s"))
        if done.shard in self._seen:
            self.retries += 1
            return False
        self._seen.add(done.shard)
        self.rows, self.ended = self.rows + done.rows, max(self.ended, at)
        return True

    @property
    def rows_per_s(self) -> float | None:
        """Rows by the time from the first actor's readiness to the last shard; None without any.

        Not from the first shard: two that are made at once come together, after all of their time.
        """
        return self.rows / (self.ended - self.began) if self.rows else None

    @property
    def actors(self) -> int:
        """Actors that have made a shard."""
        return len({actor for _, actor, _ in self._latest})

    @property
    def busy_s(self) -> float:
        """Actor-seconds spent on shards."""
        return sum(done.busy_s for done in self._latest.values())

    @property
    def encoding_s(self) -> float:
        """Of these, what went into features of captions."""
        return sum(done.encoding_s for done in self._latest.values())

    @property
    def busy_share(self) -> float:
        """Part of the actors' lives, models loaded, that they spent on shards."""
        alive = sum(done.alive_s for done in self._latest.values())
        return self.busy_s / alive if alive else 0.0

    def figures(self) -> dict[str, float]:
        """Actors, share of their time that they work, retries."""
        share = round(self.busy_share, 4)
        return {"actors": self.actors, "busy_share": share, "retries": self.retries}

    def note(self, num_gpus: float) -> str:
        """For the progress line: actors, GPUs, how busy, how often something was done again."""
        gpus = f" on {self.actors * num_gpus:g} GPUs" if num_gpus else ""
        plural = "" if self.actors == 1 else "s"
        retries = f", {self.retries} retries" if self.retries else ""
        captions = f", {self.encoding_s / self.busy_s:.0%} on captions" if self.encoding_s else ""
        return f"{self.actors} actor{plural}{gpus} {self.busy_share:.0%} busy{captions}{retries}"

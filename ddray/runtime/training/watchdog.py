"""Whether a training moves: a board that workers write on and the driver reads, and a watchdog.

Ray notices a worker that dies. One that hangs, in a collective whose partner is gone or on a dead
disk, it takes for alive: each worker watches its own steps, and the driver the workers.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# Loading, compiling and the first collective; saving to a slow storage.
_PATIENCE = 10.0
_EXIT_STATUS = 70


class Board:
    """A tiny actor between the workers of a run and its driver.

    Every call is short; workers of an earlier attempt are forgotten when new ones sign on.
    """

    def __init__(self) -> None:
        self._step, self._note = 0, ""
        self._workers: dict[int, Any] = {}
        self._seen: dict[int, float] = {}
        self._events: list[dict[str, Any]] = []
        self._failure: str | None = None
        self._reason: str | None = None
        self._stop = False

    def sign_on(self, rank: int, world: int, worker: Any) -> str | None:
        """A worker begins; returns why the run has failed for good, if it has."""
        self._workers = {r: w for r, w in self._workers.items() if r < world} | {rank: worker}
        self._seen = {r: s for r, s in self._seen.items() if r < world} | {rank: time.monotonic()}
        self._reason = None
        return self._failure

    def sign_off(self, rank: int) -> None:
        """A worker has ended, well or not, and will say no more."""
        self._seen.pop(rank, None)

    def beat(self, rank: int) -> bool:
        """A worker's process is alive; returns whether the run shall stop."""
        if rank in self._seen:
            self._seen[rank] = time.monotonic()
        return self._stop

    def put(self, step: int, note: str) -> None:
        """Say the step and what to show beside it."""
        self._step, self._note = step, note

    def tell(self, event: str, **values: Any) -> None:
        """Note what the driver should write down."""
        self._events.append({"event": event, **values})

    def fail(self, reason: str) -> None:
        """What no restart would mend: workers that sign on from now on are told to end."""
        self._failure = self._failure or reason

    def complain(self, reason: str) -> None:
        """Why an attempt has failed, where a restart may help."""
        self._reason = reason

    def stop(self) -> None:
        """Ask the workers for a last checkpoint."""
        self._stop = True

    def look(self) -> tuple[int, str, list[dict[str, Any]], str | None, str | None]:
        """Step, note, events since the last look, failure, why the last attempt failed."""
        events, self._events = self._events, []
        return self._step, self._note, events, self._failure, self._reason

    def silent(self, for_s: float) -> dict[int, Any]:
        """Workers whose process has said nothing for so long, by rank; each is named once."""
        now = time.monotonic()
        ranks = [rank for rank, seen in self._seen.items() if now - seen > for_s]
        for rank in ranks:
            del self._seen[rank]
        return {rank: self._workers[rank] for rank in ranks if rank in self._workers}


class Watchdog:
    """Ends this process when its training has not moved for too long, so that Train restarts it.

    Args:
        board: actor handle of the run's `Board`.
        rank: of this worker.
        limit_s: a step may take so long; the first one ten times that.
    """

    def __init__(self, board: Any, rank: int, limit_s: float):
        self._board, self._rank, self._limit = board, rank, limit_s
        self._patience, self._since, self._doing = _PATIENCE, time.monotonic(), "start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.stop = False

    def moved(self, doing: str) -> None:
        """Training moves; `doing` says what comes next."""
        self._since, self._doing, self._patience = time.monotonic(), doing, 1.0

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Within, ten times the limit is given."""
        self.moved(doing)
        self._patience = _PATIENCE
        try:
            yield
        finally:
            self.moved(doing)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._board.sign_off.remote(self._rank)

    def _watch(self) -> None:
        import ray

        pause = min(2.0, self._limit / 4)
        while not self._ended.wait(pause):
            stuck = time.monotonic() - self._since
            if stuck > self._limit * self._patience:
                self._end(stuck)
            with contextlib.suppress(ray.exceptions.RayError):
                self.stop = ray.get(self._board.beat.remote(self._rank), timeout=self._limit)

    def _end(self, stuck: float) -> None:
        """Leave a trace of every thread, and end hard: a stuck thread cannot be stopped."""
        import ray

        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        with contextlib.suppress(ray.exceptions.RayError):
            told = self._board.tell.remote(
                "hung", worker=self._rank, seconds=round(stuck), doing=self._doing
            )
            ray.get(told, timeout=5)
        os._exit(_EXIT_STATUS)

"""The driver beside a training that runs: progress, events, frozen workers, SIGTERM."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ddray.config.distillation import DistillConfig
from ddray.progress import Progress
from ddray.runtime.training.claim import drop_replaced
from ddray.storage import open_storage
from ddray.storage.lease import Lease
from ddray.storage.run_folder import EventLog

_POLL_S = 1.0
# Signals so close together are one.
_TOLD_TWICE_S = 3.0


class Watch:
    """The driver beside a training: progress, events, frozen workers, SIGTERM.

    Args:
        board: actor handle of the run's `Board`.
        config: the job.
        events: of the run.
        lease: of the run folder.

    Attributes:
        step: the last one that was seen.
        failure: what no restart would mend.
        reason: why the last attempt failed, if a worker could say so.
        terminated: whether SIGTERM has come.
    """

    def __init__(self, board: Any, config: DistillConfig, events: EventLog, lease: Lease):
        self._board, self._config, self._events, self._lease = board, config, events, lease
        self.step, self.terminated, self._told = 0, False, 0.0
        self.failure: str | None = None
        self.reason: str | None = None

    def run(self, fit: Callable[[], object]) -> None:
        """Train in a thread until it ends; raises what it raises.

        In the main thread Ray Train would take Ctrl-C for itself and end the process with status 1.
        """
        raised: list[BaseException] = []

        def train() -> None:
            try:
                fit()
            except BaseException as error:  # to be raised where it is waited for
                raised.append(error)

        thread = threading.Thread(target=train, daemon=True)
        bar = Progress("distillation", self._config.steps, "steps")
        with bar, self._terminable():
            thread.start()
            while thread.is_alive():
                thread.join(_POLL_S)
                self._look(bar)
                self._lease.require()
            self._look(bar)
        if raised:
            raise raised[0]

    def _look(self, bar: Progress) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            seen = ray.get(self._board.look.remote(), timeout=5)
            self.step, note, told, self.failure, self.reason = seen
            bar.advance_to(self.step, note)
            for event in told:
                self._events.add(**event)
                self._heed(**event)
            # A process that is stopped, or holds Python's lock for ever, cannot end itself.
            frozen = self._board.silent.remote(self._config.step_timeout_s)
            for rank, worker in ray.get(frozen, timeout=5).items():
                self._events.add("frozen", worker=rank)
                ray.kill(worker)

    def _heed(self, event: str, reason: str = "", **_: object) -> None:
        """Do what an event of the workers asks for."""
        if event == "first checkpoint":
            drop_replaced(open_storage(self._config.out))
        elif event == "checkpoint left out":
            print(f"ddray: {reason}; going on from an older one", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _terminable(self) -> Iterator[None]:
        """Within, SIGTERM asks the workers for a last checkpoint; one more, later, ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self.terminated:
                # `ray job stop` tells every process of a job, and a pipeline tells its stages too.
                if time.monotonic() - self._told > _TOLD_TWICE_S:
                    signal.signal(signal.SIGTERM, before)
                    signal.raise_signal(signal.SIGTERM)
                return
            self.terminated, self._told = True, time.monotonic()
            self._board.stop.remote()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

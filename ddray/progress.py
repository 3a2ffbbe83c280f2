"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Self

from tqdm import tqdm

_LINE_EVERY_S = 10.0
_LEAST_S = 1.0
# Its own rate, of the last few calls, would be that of units that are told of together.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress:
    """Counts `total` units of work on stderr.

    The rate is that since work began, where `begin` says when. Else it is that since the first
    units were done: what went before was preparation, or the work of an earlier run that is found
    when this one has started. Of less than a second it is not told: units that are told of together
    were not made in the time between.

    Args:
        label: what is being done.
        total: units in all.
        unit: name of a unit.
        done: units that an earlier run has done.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self._label, self._total, self._unit = label, total, unit
        self.done = done
        self._start = self._last_line = time.monotonic()
        self._found = done
        self._from: tuple[int, float] | None = None
        self._bar = (
            tqdm(desc=label, total=total, initial=done, bar_format=_BAR, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def begin(self, at: float | None = None) -> None:
        """Say when work began, by `time.monotonic`; None = now. The earliest time counts."""
        at = time.monotonic() if at is None else at
        if self._from is None or at < self._from[1]:
            self._from = self._found, at

    def advance_to(self, done: int, note: str = "") -> None:
        """Say that `done` units are done in all; `note` stands behind, such as a loss."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*self._speed(), *filter(None, [note])]), False)
            self._bar.update(step)
        elif step and (done >= self._total or time.monotonic() - self._last_line > _LINE_EVERY_S):
            self._last_line = time.monotonic()
            print(self._line(note), file=sys.stderr, flush=True)
        if step and self._from is None:
            self._from = done, time.monotonic()

    def _line(self, note: str) -> str:
        now = time.monotonic()
        figures = ", ".join([f"{self.done}/{self._total} {self._unit}", *self._speed()])
        if self.done >= self._total:
            figures += f" in {now - self._start:.0f} s"
        return f"{self._label}: {figures}{'; ' + note if note else ''}"

    def _speed(self) -> list[str]:
        """The rate and the time left, as far as they can be known."""
        if self._from is None:
            return []
        units, seconds = self.done - self._from[0], time.monotonic() - self._from[1]
        if not units or seconds < _LEAST_S:
            return []
        rate = units / seconds
        left = (self._total - self.done) / rate
        return [f"{rate:.1f}/s", *([f"about {left:.0f} s left"] if left > 0 else [])]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

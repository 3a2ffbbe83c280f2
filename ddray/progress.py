"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Self

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """Counts `total` units of work on stderr.

    The rate is that since the first units were done: what went before was preparation, or the work
    of an earlier run that is found when this one has started.

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
        self._from: tuple[int, float] | None = None
        self._bar = (
            tqdm(desc=label, total=total, initial=done, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance_to(self, done: int, note: str = "") -> None:
        """Say that `done` units are done in all; `note` stands behind, such as a loss."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step)
        elif step and (done >= self._total or time.monotonic() - self._last_line > _LINE_EVERY_S):
            self._last_line = time.monotonic()
            print(self._line(note), file=sys.stderr, flush=True)
        if step and self._from is None:
            self._from = done, time.monotonic()

    def _line(self, note: str) -> str:
        now = time.monotonic()
        figures = f"{self.done}/{self._total} {self._unit}"
        if self._from is not None and self.done > self._from[0]:
            rate = (self.done - self._from[0]) / max(now - self._from[1], 1e-9)
            figures += f", {rate:.1f}/s"
            if self.done < self._total:
                figures += f", about {(self._total - self.done) / rate:.0f} s left"
        if self.done >= self._total:
            figures += f" in {now - self._start:.0f} s"
        return f"{self._label}: {figures}{'; ' + note if note else ''}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

Imports nothing from ddray.
"""

import sys
import time
from typing import Self

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """Counts `total` units of work on stderr.

    Args:
        label: what is being done.
        total: units in all.
        unit: name of a unit.
        done: units that an earlier run has done; they do not count for the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self._label, self._total, self._unit = label, total, unit
        self._first, self.done = done, done
        self._start = self._last_line = time.monotonic()
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

    def _line(self, note: str) -> str:
        seconds = time.monotonic() - self._start
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = (self._total - self.done) / rate if rate else float("inf")
        end = f", about {left:.0f} s left" if self.done < self._total else f" in {seconds:.0f} s"
        figures = f"{self.done}/{self._total} {self._unit}, {rate:.1f}/s{end}"
        return f"{self._label}: {figures}{'; ' + note if note else ''}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

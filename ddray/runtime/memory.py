"""Peak memory of this process and everything it has started."""

import contextlib
import threading
from pathlib import Path
from typing import Self

import psutil


class PeakMemory:
    """Watches the memory of a whole process tree while its block runs.

    What processes share is counted once, as Linux apportions it (PSS); elsewhere resident sizes
    are added up, which counts shared pages more than once.

    Attributes:
        peak_bytes: the largest sum seen.
    """

    def __init__(self, every_s: float = 3.0):
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _tree_bytes())
            if self._over.wait(self._every_s):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)


def _tree_bytes() -> int:
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        # A process may end between being listed and being looked at.
        with contextlib.suppress(psutil.Error, OSError):
            total += _proportional_bytes(process.pid) or process.memory_info().rss
    return total


def _proportional_bytes(pid: int) -> int:
    """PSS of a process, or 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0

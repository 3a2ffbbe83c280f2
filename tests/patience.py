"""How long tests wait for what must come: until it is there, or so long that it never will be."""

import time
from collections.abc import Callable

# Only what hangs takes longer, whatever else the machine does: no verdict on anybody's speed.
PATIENCE_S = 600.0


def wait_until(
    condition: Callable[[], object], what: str, alive: Callable[[], object] = lambda: True
) -> None:
    """Wait for a condition.

    Args:
        condition: becomes true.
        what: is waited for.
        alive: stops being true where it no longer can, which ends the test at once.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert alive(), f"it ended without {what}"
        assert time.monotonic() < deadline, f"in {PATIENCE_S:g} s there was no {what}"
        time.sleep(0.05)

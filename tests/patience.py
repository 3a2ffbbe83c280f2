"""How long tests wait for what must come: until it is there, or so long that it never will be."""

import time
from collections.abc import Callable

# Only what hangs takes longer, whatever else the machine does: no verdict on anybody's speed.
PATIENCE_S = 600.0
# Whether there is still something to wait for may take a process to find out.
_LOOK_EVERY_S = 2.0


def wait_until(
    condition: Callable[[], object],
    what: str,
    alive: Callable[[], object] = lambda: True,
    told: Callable[[], object] = lambda: "",
) -> None:
    """Wait for a condition.

    Args:
        condition: becomes true.
        what: is waited for.
        alive: stops being true where it no longer can, which ends the test.
        told: what there is to say then, such as the output of the process that has ended.
    """
    looked_at = time.monotonic()
    deadline = looked_at + PATIENCE_S
    while not condition():
        if time.monotonic() - looked_at > _LOOK_EVERY_S:
            looked_at = time.monotonic()
            # What ended may have brought it about just before.
            assert alive() or condition(), f"it ended without {what}: {told()}"
        assert time.monotonic() < deadline, f"in {PATIENCE_S:g} s there was no {what}"
        time.sleep(0.05)

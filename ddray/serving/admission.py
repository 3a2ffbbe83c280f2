"""How much work may wait: as much as will be done soon, judged by what was done lately.

A number of images alone is no measure of a queue: one device makes it in a blink, another in a
minute, and small requests cost more than their images. Plain Python, told the time by its caller,
`ddray.runtime.serving.ingress`, which words the refusals.
"""

_WINDOW_S = 2.0


class Admission:
    """The door of a queue.

    Args:
        limit: images that may be under way at most, whatever the speed.
        least: as many may always be under way: twice what keeps the devices busy.
        wait_s: how long the queue may be, in seconds.

    Attributes:
        images: under way.
    """

    def __init__(self, limit: int = 1, least: int = 1, wait_s: float = 3.0):
        self.limit, self.least, self.wait_s = limit, least, wait_s
        self.images = 0
        self._per_s: float | None = None
        self._since, self._made, self._was_full = 0.0, 0, False

    @property
    def room(self) -> int:
        """Images that may be under way as things are."""
        if self._per_s is None:
            return self.limit
        return min(self.limit, max(self.least, int(self._per_s * self.wait_s)))

    def enter(self, images: int, now: float) -> bool:
        """Take in a request of so many images, if there is room.

        Args:
            images: of the request.
            now: seconds of any steady clock.

        Returns:
            Whether it is in; then `leave` must follow.
        """
        if self.images + images > max(self.room, images if not self.images else 0):
            return False
        if not self.images:
            self._begin(now)
        self.images += images
        return True

    def leave(self, images: int, made: bool, now: float) -> None:
        """A request is over.

        Args:
            images: of the request.
            made: whether they were made.
            now: as in `enter`.
        """
        full = self._is_full()
        self.images -= images
        self._made += images * made
        if now - self._since < _WINDOW_S:
            return
        per_s = self._made / (now - self._since)
        # What was done while there was little to do tells what was asked for, not what can be done.
        if (full and self._was_full) or (self._per_s is not None and per_s > self._per_s):
            self._per_s = per_s
        self._begin(now)

    def _begin(self, now: float) -> None:
        """Count what is made from here on."""
        self._since, self._made, self._was_full = now, 0, self._is_full()

    def _is_full(self) -> bool:
        """Whether the devices have as much to do as they can."""
        return 2 * self.images >= self.least

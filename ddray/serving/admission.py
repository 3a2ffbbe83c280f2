"""How much work may wait: as much as will be done soon, judged by what was done lately.

A number of images alone is no measure of a queue: one device makes it in a blink, another in a
minute, and small requests cost more than their images. Plain Python, told the time by its callers,
who word the refusals: `ddray.runtime.serving.ingress` of `Admission`, its `proxy` of `Window`.
"""

import math

_WINDOW_S = 2.0
# What was learned under load is forgotten after so long without: other requests may come next, and
# those of sixteen images by the teacher tell nothing of those of one in one step.
_FORGET_S = 2.0
# How the number of images that are asked for at a time is found, as TCP finds its window: each
# refusal of the ingress lowers it by a factor, and each window of answers raises it by a tenth, but
# no less than so many; where the ingress has long refused nothing, by the whole.
_LOWER, _RAISE, _LEAST_RAISE = 0.8, 0.1, 4.0


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
        self._full_at = 0.0

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
        if self._is_full():
            self._full_at = now
        elif now - self._full_at > _FORGET_S:
            self._per_s = None
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
        if full:
            self._full_at = now
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


class Window:
    """How many images may be asked of the ingress at a time, learned from its answers.

    Attributes:
        images: that are asked for now.
        size: as many may be.
    """

    def __init__(self) -> None:
        self.images, self.size = 0, math.inf
        self._lowered_at = self._refused_at = -math.inf

    def enter(self, images: int, now: float) -> bool:
        """Take in a request of so many images, if there is room; then `leave` must follow."""
        if now - self._refused_at > _FORGET_S:
            self.size = math.inf
        if self.images and self.images + images > self.size:
            self._refused_at = now
            return False
        self.images += images
        return True

    def leave(self, images: int) -> None:
        """A request has its answer, or none will come."""
        self.images -= images

    def made(self, images: int, now: float) -> None:
        """So many images came."""
        slow = max(_RAISE, _LEAST_RAISE / self.size)
        self.size += images * (slow if now - self._lowered_at < _FORGET_S else 1.0)

    def refused(self, together: int, began: float, now: float) -> None:
        """The ingress had no room.

        Args:
            together: images that were asked for when that request was passed on.
            began: when that was.
            now: when it was refused.
        """
        self._refused_at = now
        if began > self._lowered_at:  # once for all that were on their way together
            self.size = max(1.0, _LOWER * min(together, self.size))
            self._lowered_at = now

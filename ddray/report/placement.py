"""Where labels of points may stand so that each is read alone: plain geometry, 72 to the inch."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import hypot
from typing import NamedTuple

Spot = tuple[float, float]

_MARKER = 4.5  # half of what a marker covers
# How far a label may be from its point, then on which side. Near and beside comes first.
_RADII = (8.0, 17.0, 30.0, 46.0, 66.0)
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.7), (0.8, -0.7), (-0.8, 0.7), (-0.8, -0.7))
_ROUNDS = 3
_NEAR = 12.0  # a label no farther off than this needs no thread
_DOTS = 3.0  # between dots that stand for a line
# What it costs, beside the distance: to lie on something or outside, by area; to meet a line, by
# its dots.
_LOST, _MET = 100.0, 12.0


class Box(NamedTuple):
    """A rectangle along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, spot: Spot, width: float, height: float) -> "Box":
        """Of a width and height, around its centre."""
        (x, y), w, h = spot, width / 2, height / 2
        return cls(x - w, y - h, x + w, y + h)

    @property
    def area(self) -> float:
        """Width times height, 0 for one that is turned inside out."""
        return max(0.0, self.right - self.left) * max(0.0, self.top - self.bottom)

    def shared(self, other: "Box") -> float:
        """Area that two have in common."""
        lower = (max(self.left, other.left), max(self.bottom, other.bottom))
        return Box(*lower, min(self.right, other.right), min(self.top, other.top)).area

    def holds(self, spot: Spot) -> bool:
        """Whether a spot lies in it."""
        return self.left <= spot[0] <= self.right and self.bottom <= spot[1] <= self.top

    def nearest(self, spot: Spot) -> Spot:
        """The spot in it that is nearest to another."""
        x, y = spot
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


class Placed(NamedTuple):
    """A label: the centre of its text, and the end of the thread to its point if one is needed."""

    centre: Spot
    thread: Spot | None


def place_labels(
    points: Sequence[Spot], sizes: Sequence[Spot], line: Sequence[Spot], inside: Box
) -> list[Placed]:
    """Find a place for the labels of the first points, one after the other, and then again.

    Args:
        points: where markers are, those with a label first.
        sizes: width and height of each label.
        line: corners of a line that labels should not lie on.
        inside: where they must be.

    Returns:
        One for each of `sizes`.
    """
    markers = [Box.around(spot, 2 * _MARKER, 2 * _MARKER) for spot in points]
    line_dots = [dot for start, end in pairwise(line) for dot in _dots(start, end)]
    boxes: dict[int, Box] = {}
    for _ in range(_ROUNDS):  # the first ones did not know of the last
        for k, size in enumerate(sizes):
            others = {j: box for j, box in boxes.items() if j != k}
            threads = [_thread(points[j], box) for j, box in others.items()]
            dots = line_dots + [dot for thread in threads for dot in thread]
            boxes[k] = _best(points[k], size, [*markers, *others.values()], dots, inside)
    return [
        Placed(
            ((box.left + box.right) / 2, (box.bottom + box.top) / 2),
            box.nearest(points[k]) if _thread(points[k], box) else None,
        )
        for k, box in boxes.items()
    ]


def _best(spot: Spot, size: Spot, taken: Sequence[Box], dots: Sequence[Spot], inside: Box) -> Box:
    least, best = float("inf"), Box.around(spot, *size)
    for far, box in _places(spot, *size):
        if far >= least:
            break  # the others are still farther
        cost = far + _cost(box, spot, taken, dots, inside)
        if cost < least:
            least, best = cost, box
    return best


def _places(spot: Spot, width: float, height: float) -> Iterator[tuple[float, Box]]:
    """Where a label may be, and what that costs by itself, the least first."""
    for radius in _RADII:
        for k, (right, up) in enumerate(_SIDES):
            x = spot[0] + right * radius + _sign(right) * width / 2
            y = spot[1] + up * radius + _sign(up) * height / 2
            yield radius + k / len(_SIDES), Box.around((x, y), width, height)


def _cost(box: Box, spot: Spot, taken: Sequence[Box], dots: Sequence[Spot], inside: Box) -> float:
    lost = box.area - box.shared(inside) + sum(box.shared(other) for other in taken)
    met = sum(box.holds(dot) for dot in dots)
    # A thread that leads over other labels and markers is worse than a label on a line.
    way = [dot for dot in _thread(spot, box) if _length(spot, dot) > 2 * _MARKER]
    met += 3 * sum(other.holds(dot) for other in taken for dot in way)
    return _LOST * lost + _MET * met


def _thread(spot: Spot, box: Box) -> list[Spot]:
    """From a point to its label, as dots; none where they are neighbours."""
    end = box.nearest(spot)
    return _dots(spot, end) if _length(spot, end) > _NEAR else []


def _dots(start: Spot, end: Spot) -> list[Spot]:
    """A line as dots."""
    steps = 1 + int(_length(start, end) / _DOTS)
    (x, y), (right, up) = start, (end[0] - start[0], end[1] - start[1])
    return [(x + right * k / steps, y + up * k / steps) for k in range(steps + 1)]


def _length(start: Spot, end: Spot) -> float:
    return hypot(end[0] - start[0], end[1] - start[1])


def _sign(side: float) -> int:
    return (side > 0) - (side < 0)

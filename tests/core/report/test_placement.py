"""Labels lie on nothing where there is room, and all of them lie inside."""

import itertools
import random

from ddray.report.placement import Box, place_labels

INSIDE = Box(0, 0, 600, 300)
SIZE = (90.0, 11.0)


def boxes_of(points, line=(), inside=INSIDE):
    placed = place_labels(points, [SIZE] * len(points), line, inside)
    return [Box.around(label.centre, *SIZE) for label in placed], placed


def test_a_lone_label_stands_beside_its_point_without_a_thread():
    (box,), (label,) = boxes_of([(100, 100)])
    assert box.left > 100
    assert label.centre[1] == 100
    assert label.thread is None


def test_a_label_at_the_edge_stays_inside():
    for spot in ((595, 150), (5, 150), (300, 297), (599, 1)):
        (box,), _ = boxes_of([spot])
        assert box.shared(INSIDE) == box.area


def test_labels_of_a_crowd_do_not_touch_each_other_or_a_point():
    draws = random.Random(0)
    points = [(draws.uniform(100, 500), draws.uniform(60, 240)) for _ in range(14)]
    boxes, placed = boxes_of(points)
    assert not any(one.shared(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.holds(spot) for box in boxes for spot in points)
    assert all(box.shared(INSIDE) == box.area for box in boxes)
    for label, box in zip(placed, boxes, strict=True):
        assert label.thread is None or box.holds(label.thread)


def test_points_in_one_place_have_labels_in_several_and_threads_to_the_far_ones():
    boxes, placed = boxes_of([(300.0, 150.0)] * 12)
    assert not any(one.shared(other) for one, other in itertools.combinations(boxes, 2))
    assert any(label.thread for label in placed)


def test_a_label_leaves_a_line_alone():
    (box,), _ = boxes_of([(100, 100)], line=[(100, 100), (300, 100)])
    assert not box.holds((150, 100))


def test_markers_without_a_label_are_left_alone_too():
    (label,) = place_labels([(100, 100), (120, 100)], [SIZE], [], INSIDE)
    assert not Box.around(label.centre, *SIZE).holds((120, 100))

"""How much the image service lets in, with a clock of the test's own."""

import pytest

from ddray.serving.admission import Admission, Window


def _worked(per_s: float, seconds: float = 10.0) -> Admission:
    """A queue that was full while so many images a second were made."""
    door, now, since = Admission(limit=512, least=128, wait_s=3.0), 0.0, []
    while now < seconds:
        while door.enter(16, now):
            since.append(now)
        now += 16 / per_s
        since.pop(0)
        door.leave(16, True, now)
    for _ in since:
        door.leave(16, False, now)
    return door


def test_before_anything_is_known_the_limit_holds() -> None:
    door = Admission(limit=64, least=16)
    assert [door.enter(16, 0.0) for _ in range(5)] == [True] * 4 + [False]
    assert (door.images, door.room) == (64, 64)


@pytest.mark.parametrize(("per_s", "room"), [(10, 128), (100, 300), (1000, 512)])
def test_the_queue_is_as_long_as_what_is_made_in_time(per_s: float, room: int) -> None:
    assert _worked(per_s).room == pytest.approx(room, rel=0.15)


def test_a_quiet_time_does_not_shorten_the_queue() -> None:
    door = _worked(100)
    before = door.room
    for second in range(20, 60):
        assert door.enter(1, second)
        door.leave(1, True, second + 0.1)
    assert door.room >= before


def test_failures_are_not_taken_for_speed() -> None:
    door = Admission(limit=64, least=16)
    for second in range(20):
        while door.enter(16, second):
            pass
        door.leave(16, False, second + 0.5)
    assert door.room == 16


def test_what_has_slowed_down_gets_a_shorter_queue() -> None:
    door, now = _worked(100), 20.0
    while door.enter(16, now):
        pass
    for _ in range(20):
        now += 1.0
        door.leave(16, True, now)
        door.enter(16, now)
    assert door.room == 128


def _fresh(door: Admission, requests: int, now: float) -> int:
    """How many of so many small requests at once are taken in."""
    return sum(door.enter(1, now) for _ in range(requests))


@pytest.mark.parametrize("per_s", [1, 10, 60])
@pytest.mark.parametrize("after_s", [3.0, 60.0])
def test_what_slow_requests_taught_is_forgotten_when_they_are_gone(
    per_s: float, after_s: float
) -> None:
    door, now = Admission(limit=512, least=128), 0.0
    while now < 40.0:
        while door.enter(16, now):
            pass
        now += 16 / per_s
        door.leave(16, True, now)
    assert door.room < 200
    while door.images:
        door.leave(16, False, now)
    fresh = _fresh(Admission(limit=512, least=128), 600, 0.0)
    assert _fresh(door, 600, now + after_s) == fresh == 512


def test_under_load_nothing_is_forgotten() -> None:
    door, now = _worked(20), 100.0
    for _ in range(200):
        while door.enter(1, now):
            pass
        now += 0.05
        door.leave(1, True, now)
        assert now < 105.0 or door.room == 128


def _overloaded(images: int, room: int) -> Window:
    """After ten seconds of requests of so many images, three times what an ingress has room for."""
    window, now = Window(), 0.0
    passed: list[float] = []
    while now < 10.0:
        while len(passed) < 3 * room // images and window.enter(images, now):
            if images * (len(passed) + 1) > room:
                window.refused(window.images, now, now + 0.01)
                window.leave(images)
            else:
                passed.append(now)
            now += 0.001
        now += 0.1
        passed.pop(0)
        window.leave(images)
        window.made(images, now)
    for _ in passed:
        window.leave(images)
    return window


@pytest.mark.parametrize("images", [1, 16])
def test_the_window_is_that_of_a_new_one_after_seconds_without_refusals(images: int) -> None:
    window = _overloaded(images, 128)
    assert window.size < 256
    assert all(window.enter(1, 20.0) for _ in range(5000))


def test_the_window_counts_images() -> None:
    window = Window()
    window.enter(16, 0.0)
    window.refused(64, 0.0, 0.1)
    assert window.size == pytest.approx(51.2)
    assert [window.enter(16, 0.2) for _ in range(3)] == [True, True, False]
    assert [window.enter(1, 0.2) for _ in range(4)] == [True, True, True, False]


def test_a_lone_request_is_always_passed_on() -> None:
    window = Window()
    for second in range(100):
        window.refused(1, second, second + 0.1)
    assert window.enter(16, 99.2)


def test_a_window_that_nobody_fills_up_grows_as_fast_as_images_come() -> None:
    window, now = Window(), 0.0
    window.refused(20, now, now)
    for _ in range(10):  # the door refuses all the time, the ingress no more
        now += 1.0
        while window.enter(1, now):
            pass
        for _ in range(window.images):
            window.leave(1)
            window.made(1, now)
    assert window.size > 1000

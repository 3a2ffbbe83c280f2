"""How much the image service lets in, with a clock of the test's own."""

import pytest

from ddray.serving.admission import Admission


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
    assert door.room == before


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

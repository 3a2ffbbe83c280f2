"""What is told of long work where no terminal listens."""

import pytest

from ddray import progress
from ddray.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees, to be moved by hand; every line is told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    return now


def test_the_rate_is_that_since_the_first_units(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("training", 300, "steps")
    # A start of 30 s, in which 100 steps of an earlier run are found.
    for seconds, done in ((30, 100), (10, 150), (30, 300)):
        clock[0] += seconds
        bar.advance_to(done, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "training: 100/300 steps; loss 1",
        "training: 150/300 steps, 5.0/s, about 30 s left; loss 1",
        "training: 300/300 steps, 5.0/s in 70 s; loss 1",
    ]


def test_work_that_is_done_at_once_has_no_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    Progress("sampling", 10, "shards", done=4).advance_to(10)
    assert capsys.readouterr().err == "sampling: 10/10 shards in 0 s\n"

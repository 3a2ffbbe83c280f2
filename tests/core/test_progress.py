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


def test_units_that_are_told_of_together_have_no_rate_between_them(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("images", 600, "rows")
    for seconds, done in ((11.9, 500), (0.02, 600)):
        clock[0] += seconds
        bar.advance_to(done)
    assert capsys.readouterr().err.splitlines() == [
        "images: 500/600 rows",
        "images: 600/600 rows in 12 s",
    ]


def test_where_work_is_known_to_have_begun_the_rate_counts_from_there(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("images", 700, "rows", done=100)
    # The first word of the beginning came late; a later one knew better.
    for seconds, done, began in ((12, 600, 108.0), (0.02, 700, 107.0)):
        clock[0] += seconds
        bar.begin(began)
        bar.advance_to(done)
    assert capsys.readouterr().err.splitlines() == [
        "images: 600/700 rows, 125.0/s, about 1 s left",
        "images: 700/700 rows, 119.5/s in 12 s",
    ]
    bar = Progress("verify", 2, "shards")
    bar.begin()
    clock[0] += 0.5
    bar.advance_to(1)
    clock[0] += 1.5
    bar.advance_to(2)
    assert capsys.readouterr().err.splitlines() == [
        "verify: 1/2 shards",
        "verify: 2/2 shards, 1.0/s in 2 s",
    ]


def test_a_terminal_is_told_the_same_rate(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress("images", 600, "rows") as bar:
        clock[0] += 12
        bar.begin(108.0)
        bar.advance_to(500, "1 actor")
        clock[0] += 0.02
        bar.advance_to(600, "1 actor")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "600/600" in last
    assert "149.3/s, 1 actor]" in last

"""The board between the workers of a training and its driver, without Ray."""

from ddray.runtime.training.watchdog import Board


def test_a_silent_worker_is_named_once_and_one_that_has_ended_never() -> None:
    board = Board()
    for rank in range(3):
        board.sign_on(rank, 3, f"worker {rank}")
    assert board.silent(60) == {}
    board.sign_off(1)
    board.beat(1)  # on its way when the worker ended
    assert board.silent(-1) == {0: "worker 0", 2: "worker 2"}
    board.beat(0)
    assert board.silent(-1) == {}


def test_workers_of_a_smaller_group_replace_those_of_the_larger_one() -> None:
    board = Board()
    for rank in range(2):
        board.sign_on(rank, 2, f"first {rank}")
    board.sign_on(0, 1, "second 0")
    assert board.silent(-1) == {0: "second 0"}


def test_only_what_no_restart_would_mend_is_told_to_the_next_workers() -> None:
    board = Board()
    assert board.sign_on(0, 1, "first") is None
    board.complain("the storage is away")
    assert board.look()[-2:] == (None, "the storage is away")
    assert board.sign_on(0, 1, "second") is None
    # What the attempt before it met says nothing about this one.
    assert board.look()[-2:] == (None, None)
    board.fail("a shard is damaged")
    board.fail("and so is another")
    assert board.sign_on(0, 1, "third") == "a shard is damaged"
    assert board.look()[-2] == "a shard is damaged"


def test_events_are_told_once() -> None:
    board = Board()
    board.tell("resumed", step=5)
    board.put(7, "loss 1")
    assert board.look() == (7, "loss 1", [{"event": "resumed", "step": 5}], None, None)
    assert board.look()[2] == []

"""Sums over what a pool's actors say with their shards."""

import dataclasses

import numpy as np
import pytest

from ddray.runtime.pools.pool import Filled
from ddray.runtime.pools.tally import Done, Tally


def done(shard: int, actor: str = "a", pid: int = 1, **other: float) -> Done:
    times = {"seconds": 2.0, "busy_s": 2.0, "alive_s": 2.5, **other}
    return Done(shard=shard, rows=10, node="n", actor=actor, pid=pid, **times)


def test_busy_time_is_that_of_each_process_at_its_latest_shard() -> None:
    tally = Tally()
    assert tally.add(done(0))
    assert tally.add(done(1, busy_s=4.0, alive_s=5.0))
    assert tally.add(done(2, actor="b", pid=2, busy_s=3.0, alive_s=3.0))
    assert (tally.actors, tally.retries) == (2, 0)
    assert tally.busy_s == 7.0
    assert tally.busy_share == pytest.approx(7 / 8)
    assert tally.note(0) == "2 actors 88% busy"
    assert tally.note(0.5) == "2 actors on 1 GPUs 88% busy"


def test_the_time_of_captions_is_a_part_of_the_busy_time() -> None:
    tally = Tally()
    tally.add(done(0, encoding_s=0.2))
    tally.add(done(1, busy_s=4.0, alive_s=4.0, encoding_s=0.3))
    tally.add(done(2, actor="b", pid=2, alive_s=2.0, encoding_s=0.3))
    assert tally.encoding_s == pytest.approx(0.6)
    assert tally.note(0) == "2 actors 100% busy, 10% on captions"
    assert done(0, encoding_s=0.2).event()["encoding_s"] == 0.2
    assert "encoding_s" not in done(0).event()


def test_a_summary_tells_the_encoder_where_there_is_one() -> None:
    told = Filled(shards=1, rows=10, actor_s=8.0, encoding_s=0.5).summary()
    assert (told["encoder_seconds"], told["encoder_share"]) == (0.5, 0.0625)
    assert not {"encoder_seconds", "encoder_share"} & Filled(shards=1, actor_s=8.0).summary().keys()


def test_shards_of_one_process_may_arrive_in_any_order() -> None:
    tally = Tally()
    tally.add(done(1, busy_s=4.0, alive_s=5.0))
    tally.add(done(0))
    assert (tally.busy_s, tally.busy_share) == (4.0, 0.8)


def test_a_shard_that_comes_twice_counts_once_and_is_a_retry() -> None:
    tally = Tally()
    assert tally.add(done(0))
    assert not tally.add(done(0))
    assert tally.retries == 1


def test_an_actor_in_a_new_process_is_a_retry_and_no_second_actor() -> None:
    tally = Tally()
    tally.add(done(0, pid=1))
    tally.add(done(1, pid=2))
    assert (tally.actors, tally.retries, tally.busy_s) == (1, 1, 4.0)
    assert tally.note(0) == "1 actor 80% busy, 1 retries"


def test_a_row_of_numpy_values_reads_as_plain_ones() -> None:
    row = {name: np.array([value])[0] for name, value in dataclasses.asdict(done(3)).items()}
    read = Done.from_row(row)
    assert read == done(3)
    assert {type(value) for value in dataclasses.astuple(read)} == {int, float, str}


def test_shards_that_come_together_were_not_made_in_the_time_between() -> None:
    tally = Tally()
    # One actor, ready at 100, made both at once; word of both came at its end.
    tally.add(done(1, alive_s=4.0, seconds=4.0), 104.0)
    tally.add(done(0, alive_s=4.0, seconds=4.0), 104.02)
    assert tally.rows_per_s == pytest.approx(20 / 4.02)


def test_a_single_shard_has_a_rate_and_none_has_none() -> None:
    tally = Tally()
    assert tally.rows_per_s is None
    tally.add(done(0, alive_s=2.5), 50.0)
    assert tally.rows_per_s == pytest.approx(10 / 2.5)


def test_a_rate_counts_from_the_first_actor_however_late_its_word_comes() -> None:
    tally = Tally()
    # Ready at 10 and 13; word of the first shard took 3 s, of the second nothing.
    tally.add(done(0, alive_s=2.0), 15.0)
    tally.add(done(1, actor="b", pid=2, alive_s=4.0), 17.0)
    tally.add(done(2, alive_s=8.0), 18.0)
    # What came twice counts once.
    assert not tally.add(done(2, alive_s=9.0), 19.0)
    assert tally.rows_per_s == pytest.approx(30 / 8)

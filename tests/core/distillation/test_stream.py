"""Facts about the rows of a step: their order, who reads and holds them, what is refused."""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddray
from ddray.distillation.optimization import jump_stages
from ddray.distillation.order import BlockCursor, ShardOrder, check_state, default_lanes
from ddray.distillation.stream import Batch, TrajectoryStream
from ddray.errors import ConfigError, ShardError
from ddray.method.conditioning import Captions
from ddray.prefetch import Prefetch
from ddray.sets.captions import captions_name, cut_captions
from ddray.sets.inspection import trainable_shards
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.caption_file import CaptionFile
from tests.core.sets.trajectories.test_trajectory_set import fill, plan_of, tokens_of
from tests.core.tiny import chi_square_p_value
from tests.patience import wait_until

WIDTH = 4
SETTINGS: dict[str, Any] = {"batch_size": 8, "seed": 3, "code_width": WIDTH}


def made(folder: Path, count: int, shard_rows: int) -> TrajectorySet:
    """A set of short rows."""
    plan = plan_of(count=count, shard_rows=shard_rows, stages=(1, 1, 2), vocab_size=64)
    trajectories = TrajectorySet.create(str(folder), plan)
    fill(trajectories)
    return trajectories


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> TrajectorySet:
    """57 rows in 6 shards, the last of 7."""
    return made(tmp_path_factory.mktemp("sets"), 57, 10)


def stream_of(trajectories: TrajectorySet, **other: Any) -> TrajectoryStream:
    return TrajectoryStream(trajectories, **{**SETTINGS, **other})


def batches_of(
    trajectories: TrajectorySet, steps: int, start: int = 0, **other: Any
) -> list[Batch]:
    with stream_of(trajectories, **other) as stream:
        return list(islice(stream.batches(start), steps))


def indices_of(trajectories: TrajectorySet, steps: int, start: int = 0, **other: Any) -> np.ndarray:
    """Sample indices of some steps, [steps, B]."""
    batches = batches_of(trajectories, steps, start, **other)
    return torch.stack([batch.index_B for batch in batches]).numpy()


def assert_equal(one: Sequence[Batch], two: Sequence[Batch]) -> None:
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The order.


@pytest.mark.parametrize("buffer_shards", [1, 3, 50])
@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("follow", [False, True])
def test_every_shard_is_dealt_once_an_epoch_and_every_row_of_it_given_once(
    buffer_shards: int, lanes: int, follow: bool
) -> None:
    plan = plan_of(count=57, shard_rows=10)
    order = ShardOrder(plan, lanes=lanes, buffer_shards=buffer_shards, seed=1, follow=follow)
    epochs, dealt = 2 * lanes * buffer_shards, []
    for lane in range(lanes):
        shards: list[int] = []
        for number in range(epochs * 6):
            block = order.block(lane, number)
            rows = order.block_rows(lane, number)
            assert sorted(rows) == list(range(sum(order.rows[k] for k in block)))
            shards += block
            if len(shards) * lanes >= epochs * 6:
                break
        dealt.append(shards)
    sequence = [dealt[entry % lanes][entry // lanes] for entry in range(epochs * 6)]
    for epoch in range(epochs):
        assert sorted(sequence[epoch * 6 : epoch * 6 + 6]) == list(range(6))
    assert (sequence[:6] == list(range(6))) == follow
    assert sequence[6:12] != sequence[12:18]


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_stream_gives_the_rows_of_its_lanes_blocks(
    trajectories: TrajectorySet, lanes: int
) -> None:
    order = ShardOrder(trajectories.plan, lanes=lanes, buffer_shards=2, seed=3)
    indices = indices_of(trajectories, 40, lanes=lanes, buffer_shards=2)
    for lane, given in enumerate(np.split(indices, lanes, axis=1)):
        expected: list[int] = []
        for number in range(40 * 8 // lanes // 10):
            of_block = np.concatenate(
                [trajectories.plan.shard_range(k) for k in order.block(lane, number)]
            )
            expected += of_block[order.block_rows(lane, number)].tolist()
        assert given.ravel().tolist() == expected[: given.size]


@pytest.mark.parametrize(("lanes", "buffer_shards"), [(1, 1), (2, 1), (3, 2), (6, 1)])
def test_lanes_that_end_with_an_epoch_have_used_every_row_once(
    tmp_path: Path, lanes: int, buffer_shards: int
) -> None:
    even = made(tmp_path, 60, 10)
    indices = indices_of(even, 30, lanes=lanes, buffer_shards=buffer_shards, batch_size=6)
    for epoch in indices.reshape(3, 60):
        assert sorted(epoch) == list(range(60))


def test_one_lane_uses_every_row_equally_often(trajectories: TrajectorySet) -> None:
    # A block of twelve shards is two epochs.
    indices = indices_of(trajectories, 57, lanes=1, buffer_shards=12)
    assert Counter(indices.ravel().tolist()) == dict.fromkeys(range(57), 8)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shard_rows", "lanes"), [(57, 10, 8), (5, 10, 2), (3, 1, 8)])
def test_rows_differ_little_in_how_often_they_are_used(
    tmp_path: Path, count: int, shard_rows: int, lanes: int
) -> None:
    small = made(tmp_path, count, shard_rows)
    used = Counter(indices_of(small, 150, lanes=lanes, buffer_shards=2).ravel().tolist())
    mean = 1200 / count
    assert sorted(used) == list(range(count))
    assert max(used.values()) < 1.25 * mean
    assert min(used.values()) > 0.75 * mean


def test_the_order_is_uniform(tmp_path: Path) -> None:
    """Which row stands in which place of a block: each pair as often as any other."""
    plan = plan_of(count=12, shard_rows=4)
    order = ShardOrder(plan, lanes=1, buffer_shards=3, seed=5)
    counts = np.zeros((12, 12))
    for number in range(1200):
        of_block = np.concatenate([plan.shard_range(k) for k in order.block(0, number)])
        counts[np.arange(12), of_block[order.block_rows(0, number)]] += 1
    # Rows and columns sum to 1200, so the degrees of freedom are 11 x 11.
    statistic = ((counts - 100) ** 2 / 100).sum()
    assert 121 - 5 * (2 * 121) ** 0.5 < statistic < 121 + 5 * (2 * 121) ** 0.5
    follows = Counter(order.block(0, number)[0] for number in range(3000))
    counts_3 = torch.tensor([follows[k] for k in range(3)])
    assert chi_square_p_value(counts_3, torch.full((3,), 1 / 3)) > 1e-3


def test_seeds_lanes_and_buffers_are_orders_of_their_own(trajectories: TrajectorySet) -> None:
    orders = [
        indices_of(trajectories, 5, **other).tolist()
        for other in ({}, {"seed": 4}, {"lanes": 4}, {"lanes": 4, "buffer_shards": 2})
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


# A function of the step.


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1, 7, 29])
@pytest.mark.parametrize("other", [{}, {"lanes": 1, "buffer_shards": 3}, {"follow": True}])
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(
    trajectories: TrajectorySet, start: int, other: dict[str, Any]
) -> None:
    whole = batches_of(trajectories, 34, **other)
    assert_equal(batches_of(trajectories, 5, start, **other), whole[start : start + 5])
    with stream_of(trajectories, **other) as stream:
        next(stream.batches(20))
        assert_equal(list(islice(stream.batches(start), 5)), whole[start : start + 5])


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_workers_are_the_batch_of_one(
    trajectories: TrajectorySet, world: int, lanes: int
) -> None:
    whole = batches_of(trajectories, 12, lanes=lanes)
    parts = [
        batches_of(trajectories, 12, lanes=lanes, rank=rank, world=world) for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        for name in ("noise_BLE", "tokens_BL", "cond_B", "index_B"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
    each = 8 // world
    stages = [jump_stages((0, 2), 8 + r * each, each, torch.device("cpu")) for r in range(world)]
    assert torch.equal(torch.cat(stages), jump_stages((0, 2), 8, 8, torch.device("cpu")))


def test_a_batch_holds_what_belongs_to_its_indices(trajectories: TrajectorySet) -> None:
    index, label, tokens = trajectories.rows(0, 57)
    for batch in batches_of(trajectories, 9):
        rows = batch.index_B.numpy()
        assert batch.tokens_BL.dtype == batch.cond_B.dtype == batch.index_B.dtype == torch.int64
        np.testing.assert_array_equal(batch.tokens_BL, tokens[rows])
        np.testing.assert_array_equal(batch.cond_B, label[rows])
        expected = ddray.noise(trajectories.plan.seed, batch.index_B, (4, WIDTH))
        assert torch.equal(batch.noise_BLE, expected)


def test_micro_batches_are_the_batch_cut_in_order(trajectories: TrajectorySet) -> None:
    (batch,) = batches_of(trajectories, 1)
    parts = batch.split(4)
    assert [len(part.index_B) for part in parts] == [2] * 4
    for whole, *cuts in zip(batch, *parts, strict=True):
        assert torch.equal(torch.cat(cuts), whole)
    captions = batch._replace(cond_B=Captions(torch.arange(8.0)[:, None, None], torch.ones(8, 1)))
    assert captions.split(2)[1].cond_B.features_BTD.ravel().tolist() == [4, 5, 6, 7]
    with pytest.raises(ConfigError, match="8 rows of a worker do not divide into 3 micro batches"):
        batch.split(3)


def test_a_state_names_the_cursor_and_refuses_another_order(trajectories: TrajectorySet) -> None:
    stream = stream_of(trajectories, lanes=4, buffer_shards=2)
    state = json.loads(json.dumps(stream.state(25)))
    assert state["step"] == 25
    for lane, (block, offset) in enumerate(zip(state["block"], state["offset"], strict=True)):
        cursor = BlockCursor(ShardOrder(trajectories.plan, lanes=4, buffer_shards=2, seed=3), lane)
        cursor.seek(50)
        assert (cursor.number, 50 - cursor.first) == (block, offset)
        assert 0 <= offset < cursor.rows
    check_state(state, stream.identity())
    # The number of workers is no part of it.
    check_state(state, stream_of(trajectories, lanes=4, buffer_shards=2, world=2).identity())
    for other, told in (
        ({"seed": 9}, "seed: 3 then, 9 now"),
        ({"batch_size": 16}, "batch_size: 8 then, 16 now"),
        ({"shards": [0, 1]}, "shards: "),
        ({"follow": True}, "follow: False then, True now"),
    ):
        changed = stream_of(trajectories, **{"lanes": 4, "buffer_shards": 2, **other})
        with pytest.raises(ConfigError, match=told):
            check_state(state, changed.identity())


# What is read and held.


class Counting:
    """The set, with the shards it was asked for."""

    def __init__(self, trajectories: TrajectorySet):
        self.plan, self._trajectories = trajectories.plan, trajectories
        self.read: list[int] = []

    def read_shard(self, k: int) -> Any:
        self.read.append(k)
        return self._trajectories.read_shard(k)


def test_seeking_reads_the_blocks_of_the_step_and_no_others(tmp_path: Path) -> None:
    counting = Counting(made(tmp_path, 320, 10))
    settings = {**SETTINGS, "lanes": 4, "buffer_shards": 2}
    order = ShardOrder(counting.plan, lanes=4, buffer_shards=2, seed=3)
    with TrajectoryStream(counting, **settings, rank=1, world=2) as stream:  # type: ignore[arg-type]
        next(stream.batches(101))
    # Row 202 of each lane: the third row of its eleventh block, and nothing is due of the next.
    allowed = {k for lane in (2, 3) for number in (10, 11) for k in order.block(lane, number)}
    assert {k for lane in (2, 3) for k in order.block(lane, 10)} <= {*counting.read} <= allowed
    assert len(counting.read) == len({*counting.read})


@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_bounded_and_each_worker_reads_its_share(tmp_path: Path, world: int) -> None:
    counting = Counting(made(tmp_path, 200, 5))
    settings = {**SETTINGS, "lanes": 4, "buffer_shards": 2, "world": world}
    with TrajectoryStream(counting, **settings) as stream:  # type: ignore[arg-type]
        assert stream.most_shards == 16 // world
        held = [stream.rows_in_memory for _ in islice(stream.batches(), 100)]
    assert max(held) <= stream.most_shards * 5
    # The blocks that are read from are always there.
    assert min(held) >= stream.most_shards // 2 * 5
    # 100 steps of 8 rows are 4 epochs; what is read ahead comes on top.
    assert 0 <= len(counting.read) - 100 * 8 / 5 / world <= stream.most_shards


def test_shards_are_read_ahead_in_turns(tmp_path: Path) -> None:
    counting = Counting(made(tmp_path, 330, 5))
    settings = {**SETTINGS, "lanes": 8, "buffer_shards": 4}
    loads = []
    with TrajectoryStream(counting, **settings) as stream:  # type: ignore[arg-type]
        for _ in islice(stream.batches(), 100):
            loads.append(len(counting.read))
    # All eight blocks of four end at the same step; a shard of each lane is due every five. A few
    # batches may be made between two looks.
    assert max(np.diff(loads[3:])) <= 8


@pytest.mark.parametrize("world", [1, 2])
def test_a_small_set_is_read_once(trajectories: TrajectorySet, world: int) -> None:
    counting = Counting(trajectories)
    with TrajectoryStream(counting, **SETTINGS, world=world) as stream:  # type: ignore[arg-type]
        for _ in islice(stream.batches(), 100):
            assert stream.rows_in_memory <= 57
    assert sorted(counting.read) == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shard_rows"), [(57, 10), (5, 10), (1, 1), (3, 1)])
@pytest.mark.parametrize("batch_size", [1, 16, 96])
def test_no_batch_is_short(tmp_path: Path, count: int, shard_rows: int, batch_size: int) -> None:
    indices = indices_of(made(tmp_path, count, shard_rows), 20, batch_size=batch_size)
    assert indices.shape == (20, batch_size)
    assert {*indices.ravel().tolist()} <= {*range(count)}
    if batch_size == 96:
        assert len({*indices.ravel().tolist()}) == count


def test_a_part_of_the_shards_is_enough(trajectories: TrajectorySet) -> None:
    indices = indices_of(trajectories, 30, shards=[5, 1])
    assert {*indices.ravel().tolist()} == {*range(10, 20), *range(50, 57)}


def test_captions_come_with_their_rows(tmp_path: Path) -> None:
    plan = plan_of(count=25, conditioning="text", num_classes=0)
    trajectories = TrajectorySet.create(str(tmp_path / "set"), plan)
    texts = [f"cat {i}" for i in range(25)]
    rows = [{"index": i, "caption": t, "features": [[i, 1.0]]} for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut_captions(
        CaptionFile(str(tmp_path / "a.jsonl"), length=1, width=2), trajectories.storage, plan
    )
    for k in range(3):
        index = plan.shard_range(k)
        trajectories.write_shard(k, index, [texts[i] for i in index], tokens_of(plan, index))
    for batch in batches_of(trajectories, 6, condition=_asked):
        assert batch.cond_B[:, 0, 0].tolist() == batch.index_B.tolist()
    assert trainable_shards(trajectories) == [0, 1, 2]
    # Captions of another shard, whole in themselves.
    other = trajectories.storage.read(captions_name(1))
    trajectories.storage.write(captions_name(0), other)
    with pytest.raises(ShardError, match="other captions than it holds, in shard 0"):
        batches_of(trajectories, 6, condition=_asked)
    with pytest.raises(ShardError, match="has 1 damaged of 3 shards, .*not those of the shard"):
        trainable_shards(trajectories)
    assert trainable_shards(trajectories, allow_partial=True) == [1, 2]


def _asked(asked: Any) -> Any:
    features_BTD, mask_BT = asked
    assert mask_BT.all()
    return features_BTD


# What goes wrong.


def test_a_damaged_shard_is_named_by_the_batch_that_needs_it(tmp_path: Path) -> None:
    damaged = made(tmp_path, 57, 10)
    path = tmp_path / shard_name(3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ShardError, match=r"shard-00003.parquet: damaged or truncated"):
        batches_of(damaged, 20, lanes=1, buffer_shards=1)
    assert len(batches_of(damaged, 20, shards=[0, 1, 2, 4, 5])) == 20


def test_what_does_not_divide_is_refused(trajectories: TrajectorySet) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=8 must be a multiple of lanes=3"):
        stream_of(trajectories, lanes=3)
    told = r"workers=3 must divide lanes=8, .*: take one of 1, 2, 4, 8 workers, or start afresh"
    with pytest.raises(ConfigError, match=told):
        stream_of(trajectories, lanes=8, world=3)
    with pytest.raises(ConfigError, match="batch_size=8 must be a multiple of workers=3"):
        stream_of(trajectories, world=3)
    for name in ("lanes", "buffer_shards"):
        with pytest.raises(ConfigError, match=f"{name}=0 must be a positive integer"):
            stream_of(trajectories, **{name: 0})
    with pytest.raises(ShardError, match="no shard to train on"):
        stream_of(trajectories, shards=[])
    with pytest.raises(ShardError, match="shard 6 does not exist"):
        stream_of(trajectories, shards=[6])


@pytest.mark.parametrize(
    ("batch_size", "workers", "lanes"),
    [(16, 1, 16), (128, 1, 64), (96, 1, 48), (100, 1, 20), (7, 1, 7), (1000, 8, 40), (67, 1, 1)]
    + [(256, 128, 128), (100, 25, 50)],
)
def test_lanes_leave_the_usual_numbers_of_workers(
    batch_size: int, workers: int, lanes: int
) -> None:
    assert default_lanes(batch_size, workers) == lanes
    assert batch_size % lanes == lanes % workers == 0


def test_lanes_can_be_few_where_a_set_is_still_to_come() -> None:
    assert default_lanes(64, most=4) == 4
    assert default_lanes(64, 8, most=4) == 8


# The thread.


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ddray-prefetch"]


def test_closing_leaves_no_thread(trajectories: TrajectorySet) -> None:
    stream = stream_of(trajectories)
    with stream:
        batches = stream.batches()
        next(batches)
        assert len(threads()) == 1
        next(stream.batches(5))
        assert len(threads()) == 1
        assert list(batches) == []
    assert threads() == []
    stream.close()


def test_items_are_made_ahead_but_not_further_than_asked() -> None:
    items = []

    def endless() -> Any:
        for number in range(10**9):
            items.append(number)
            yield number

    with Prefetch(endless(), 2) as ahead:
        for number in range(5):
            assert next(ahead) == number
            wait_until(lambda k=number: len(items) >= k + 3, "item ahead")
            assert len(items) == number + 3
    assert next(ahead, None) is None


def test_what_the_thread_raises_is_raised_in_its_turn_and_again() -> None:
    def failing() -> Any:
        yield 1
        raise ShardError("shard 7 is gone")

    with Prefetch(failing(), 2) as ahead:
        assert next(ahead) == 1
        for _ in range(2):
            with pytest.raises(ShardError, match="shard 7 is gone"):
                next(ahead)
    assert list(Prefetch(iter("abc"), 2)) == ["a", "b", "c"]


# A set that is still being sampled.


def copied(source: TrajectorySet, target: TrajectorySet, k: int) -> None:
    target.write_shard(k, *source.read_shard(k))


@pytest.mark.parametrize("lanes", [1, 4])
def test_following_a_set_gives_what_the_finished_set_gives(
    trajectories: TrajectorySet, tmp_path: Path, lanes: int
) -> None:
    growing = TrajectorySet.create(str(tmp_path), trajectories.plan)

    def write() -> None:
        for k in (1, 0, 3, 2, 5, 4):
            time.sleep(0.03)
            copied(trajectories, growing, k)

    writer = threading.Thread(target=write)
    writer.start()
    settings = {"follow": True, "lanes": lanes, "buffer_shards": 2}
    indices = indices_of(growing, 30, poll_s=0.005, **settings)
    writer.join()
    np.testing.assert_array_equal(indices, indices_of(trajectories, 30, **settings))
    # The first epoch is in the order of the shards.
    if lanes == 1:
        assert (indices.ravel()[:50] // 10).tolist() == sorted(indices.ravel()[:50] // 10)


def test_following_begins_as_soon_as_there_is_a_shard_for_each_lane(
    trajectories: TrajectorySet, tmp_path: Path
) -> None:
    growing = TrajectorySet.create(str(tmp_path), trajectories.plan)
    for k in (0, 1):
        copied(trajectories, growing, k)
    with stream_of(growing, follow=True, lanes=2, poll_s=0.005, stall_timeout_s=60) as stream:
        batches = stream.batches()
        # Two shards of ten are two steps of four rows a lane, and half of a third one.
        assert all((next(batches).index_B < 20).tolist() for _ in range(2))
        wait_until(lambda: stream.waiting, "word that the stream waits")
        assert str(stream.waiting).startswith("waiting for shard 2 for")
    # Closing ended the wait.
    assert threads() == []


def test_a_set_that_does_not_grow_is_told_in_one_line(
    trajectories: TrajectorySet, tmp_path: Path
) -> None:
    growing = TrajectorySet.create(str(tmp_path), trajectories.plan)
    copied(trajectories, growing, 0)
    told = r"got no new shard for 0 s, and shard 1 is not there; .*`ddray sample` still runs"
    with pytest.raises(ShardError, match=told) as stalled:
        batches_of(growing, 3, follow=True, lanes=1, poll_s=0.01, stall_timeout_s=0.05)
    assert "\n" not in str(stalled.value)
    with pytest.raises(ConfigError, match="follow waits for every shard"):
        stream_of(growing, follow=True, shards=[0])


# Before a run.


def test_only_sound_shards_are_trained_on(tmp_path: Path) -> None:
    whole = made(tmp_path, 57, 10)
    assert trainable_shards(whole) == list(range(6))
    (tmp_path / shard_name(4)).unlink()
    with pytest.raises(ShardError, match=r"lacks 1 of 6 shards; .*--allow-partial.*--follow"):
        trainable_shards(whole)
    assert trainable_shards(whole, follow=True) == [0, 1, 2, 3, 5]
    path = tmp_path / shard_name(2)
    path.write_bytes(path.read_bytes()[:-40])
    for follow in (False, True):
        told = r"has 1 damaged of 6 shards, first shards/shard-00002.parquet: damaged or truncated"
        with pytest.raises(ShardError, match=told) as refused:
            trainable_shards(whole, follow=follow)
        assert "\n" not in str(refused.value)
    assert trainable_shards(whole, allow_partial=True) == [0, 1, 3, 5]
    with pytest.raises(ConfigError, match="not both"):
        trainable_shards(whole, allow_partial=True, follow=True)
    for k in (0, 1, 3, 5):
        (tmp_path / shard_name(k)).unlink()
    with pytest.raises(ShardError, match="holds no sound shard"):
        trainable_shards(whole, allow_partial=True)

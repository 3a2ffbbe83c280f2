"""Which requests share a batch, in which order, and what becomes of those that fail or leave."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddray.serving.batching import Batcher

# A call that hangs must fail its test; no test comes near it.
_PATIENCE_S = 20.0


class Device:
    """Notes its batches, and answers each item by its double as soon as it may end a batch."""

    def __init__(self, may_end: int = 1000) -> None:
        self.batches: list[tuple[Any, list[int]]] = []
        self._permits = asyncio.Semaphore(may_end)

    def end(self, batches: int = 1000) -> None:
        for _ in range(batches):
            self._permits.release()

    async def run(self, kind: Any, items: list[int]) -> Sequence[int]:
        self.batches.append((kind, items))
        await self._permits.acquire()
        if any(item < 0 for item in items):
            raise ValueError(f"cannot double {items}")
        return [2 * item for item in items]


def _play(scene: Coroutine[Any, Any, None]) -> None:
    async def watched() -> None:
        await asyncio.wait_for(scene, _PATIENCE_S)

    asyncio.run(watched())


async def _settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def _ask(
    batcher: Batcher[int, int], *items: int, kind: Any = "a", size: int = 1
) -> list[asyncio.Task[int]]:
    return [asyncio.ensure_future(batcher(kind, item, size)) for item in items]


async def _busy(limit: int, **other: Any) -> tuple[Device, Batcher[int, int], asyncio.Task[int]]:
    """A device under way with the request 0, behind which others can wait."""
    device = Device(may_end=0)
    batcher: Batcher[int, int] = Batcher(device.run, limit, **other)
    (first,) = _ask(batcher, 0)
    await _settle()
    return device, batcher, first


def test_each_request_gets_its_own_result() -> None:
    async def scene() -> None:
        device = Device()
        batcher: Batcher[int, int] = Batcher(device.run, 4)
        assert await asyncio.gather(*_ask(batcher, *range(11))) == [2 * k for k in range(11)]
        assert [len(items) for _, items in device.batches] == [4, 4, 3]

    _play(scene())


def test_an_idle_device_starts_at_once_with_all_that_came_together() -> None:
    async def scene() -> None:
        device = Device()
        batcher: Batcher[int, int] = Batcher(device.run, 8)
        assert await batcher("a", 1) == 2
        await asyncio.gather(*_ask(batcher, 2, 3, 4))
        assert device.batches == [("a", [1]), ("a", [2, 3, 4])]

    _play(scene())


def test_what_waits_when_the_device_is_free_goes_together_up_to_the_limit() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=4)
        others = []
        for item in range(1, 10):  # one by one, as clients come
            others += _ask(batcher, item)
            await _settle()
        assert device.batches == [("a", [0])]
        assert batcher.queued == 9
        device.end()
        await asyncio.gather(first, *others)
        assert device.batches[1:] == [("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8]), ("a", [9])]
        assert batcher.queued == 0

    _play(scene())


def test_sizes_add_up_to_the_limit_at_most() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=8)
        others = [*_ask(batcher, 1, 2, size=3), *_ask(batcher, 3, 4, size=2), *_ask(batcher, 5)]
        await _settle()
        assert batcher.queued == 11
        device.end()
        await asyncio.gather(first, *others)
        assert device.batches[1:] == [("a", [1, 2, 3]), ("a", [4, 5])]

    _play(scene())


def test_kinds_never_mix_and_the_oldest_request_is_always_in_the_next_batch() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=2)
        others = []
        for item, kind in enumerate("babbab", 1):
            others += _ask(batcher, item, kind=kind)
        await _settle()
        device.end()
        await asyncio.gather(first, *others)
        assert device.batches[1:] == [("b", [1, 3]), ("a", [2, 5]), ("b", [4, 6])]

    _play(scene())


def test_a_rare_kind_does_not_starve_under_a_stream_of_another() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=2)
        stream = _ask(batcher, 1, 2)
        (rare,) = _ask(batcher, 9, kind="rare")
        await _settle()

        async def keep_coming() -> None:
            while not rare.done():
                stream.extend(_ask(batcher, 3, 4))
                await asyncio.sleep(0)

        coming = asyncio.ensure_future(keep_coming())
        device.end()
        await rare
        assert device.batches[1:3] == [("a", [1, 2]), ("rare", [9])]
        await asyncio.gather(first, coming, *stream)

    _play(scene())


def test_a_request_beyond_the_limit_goes_alone() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=3)
        others = [*_ask(batcher, 1), *_ask(batcher, 2, size=5), *_ask(batcher, 3, 4)]
        await _settle()
        device.end()
        await asyncio.gather(first, *others)
        # It is passed over by what still fits to an older one, and by nothing else.
        assert device.batches[1:] == [("a", [1, 3, 4]), ("a", [2])]

    _play(scene())


def test_one_who_leaves_before_the_batch_costs_nothing() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=3)
        others = _ask(batcher, 1, 2, 3, 4)
        await _settle()
        others[0].cancel()
        others[2].cancel()
        await _settle()
        assert batcher.queued == 2
        device.end()
        assert await asyncio.gather(first, others[1], others[3]) == [0, 4, 8]
        assert device.batches[1:] == [("a", [2, 4])]

    _play(scene())


def test_where_all_have_left_nothing_runs() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=3)
        others = _ask(batcher, 1, 2)
        await _settle()
        for task in others:
            task.cancel()
        device.end()
        await first
        await _settle()
        assert device.batches == [("a", [0])]
        assert await batcher("a", 5) == 10

    _play(scene())


def test_one_who_leaves_during_the_batch_takes_nothing_from_the_others() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=3)
        others = _ask(batcher, 1, 2, 3)
        device.end(1)
        await first
        await _settle()
        assert device.batches[1:] == [("a", [1, 2, 3])]
        others[1].cancel()
        device.end()
        assert await asyncio.gather(others[0], others[2]) == [2, 6]
        assert others[1].cancelled()

    _play(scene())


def test_an_error_reaches_all_of_its_batch_and_no_other() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=2)
        others = _ask(batcher, 1, -1, 2, 3)
        device.end()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert [str(result) for result in results] == [
            "0",
            "cannot double [1, -1]",
            "cannot double [1, -1]",
            "4",
            "6",
        ]

    _play(scene())


def test_an_error_of_which_nobody_is_left_to_hear_stops_nothing() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=1)
        lost, last = _ask(batcher, -1, 7)
        device.end(1)
        await first
        await _settle()
        assert device.batches[1:] == [("a", [-1])]
        lost.cancel()
        device.end()
        assert await last == 14

    _play(scene())


@pytest.mark.parametrize("fault", ["too few results", "metrics fail"])
def test_a_broken_run_is_an_error_and_no_silence(fault: str) -> None:
    def started(size: int, waited_s: list[float]) -> None:
        if fault == "metrics fail":
            raise RuntimeError(fault)

    async def run(kind: Any, items: list[int]) -> list[int]:
        return items[1:]

    async def scene() -> None:
        batcher: Batcher[int, int] = Batcher(run, 4, started=started)
        for _ in range(2):
            results = await asyncio.gather(*_ask(batcher, 1, 2), return_exceptions=True)
            assert all(isinstance(result, ValueError | RuntimeError) for result in results)

    _play(scene())


def test_a_run_that_is_cancelled_leaves_nobody_waiting() -> None:
    async def run(kind: Any, items: list[int]) -> list[int]:
        if items == [1]:
            raise asyncio.CancelledError
        return items

    async def scene() -> None:
        batcher: Batcher[int, int] = Batcher(run, 1)
        with pytest.raises(asyncio.CancelledError):
            await batcher("a", 1)
        assert await batcher("a", 2) == 2

    _play(scene())


def test_the_oldest_waits_for_company_no_longer_than_told() -> None:
    async def scene() -> None:
        device = Device()
        batcher: Batcher[int, int] = Batcher(device.run, 3, wait_s=0.004)
        began = time.monotonic()
        assert await batcher("a", 1) == 2
        assert time.monotonic() - began >= 0.004

    _play(scene())


def test_company_that_fills_the_batch_ends_the_wait() -> None:
    async def scene() -> None:
        device = Device()
        # Longer than the test's patience.
        batcher: Batcher[int, int] = Batcher(device.run, 3, wait_s=10 * _PATIENCE_S)
        tasks = _ask(batcher, 1)
        await _settle()
        tasks += _ask(batcher, 2)
        await _settle()
        assert device.batches == []
        tasks += _ask(batcher, 3)
        await asyncio.gather(*tasks)
        assert device.batches == [("a", [1, 2, 3])]

    _play(scene())


def test_the_limit_may_change_while_requests_wait() -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit=2)
        others = _ask(batcher, *range(1, 8))
        await _settle()
        batcher.limit = 4
        device.end(1)
        await first
        await _settle()
        batcher.limit = 1
        device.end()
        await asyncio.gather(*others)
        assert [len(items) for _, items in device.batches] == [1, 4, 1, 1, 1]

    _play(scene())


def test_the_start_of_a_batch_is_told_with_its_size_and_the_waits() -> None:
    async def scene() -> None:
        told: list[tuple[int, list[float]]] = []
        device, batcher, first = await _busy(
            limit=4, started=lambda size, waited_s: told.append((size, waited_s))
        )
        others = [*_ask(batcher, 1), *_ask(batcher, 2, size=3)]
        await asyncio.sleep(0.003)
        device.end()
        await asyncio.gather(first, *others)
        assert [(size, len(waited_s)) for size, waited_s in told] == [(1, 1), (4, 2)]
        assert told[0][1][0] >= 0
        assert told[1][1][0] >= told[1][1][1] >= 0.003

    _play(scene())


REQUESTS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(REQUESTS, st.integers(1, 6), st.sets(st.integers(0, 29)))
def test_any_mix_is_served_whole_in_proper_batches(
    requests: list[tuple[str, int]], limit: int, leaving: set[int]
) -> None:
    async def scene() -> None:
        device, batcher, first = await _busy(limit)
        tasks = [
            _ask(batcher, item, kind=kind, size=size)[0]
            for item, (kind, size) in enumerate(requests)
        ]
        await _settle()
        for item in leaving & set(range(len(tasks))):
            tasks[item].cancel()
        device.end()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        staying = [item for item in range(len(requests)) if item not in leaving]
        assert [results[1 + item] for item in staying] == [2 * item for item in staying]
        batches = device.batches[1:]
        assert sorted(item for _, items in batches for item in items) == staying
        for kind, items in batches:
            assert {requests[item][0] for item in items} == {kind}
            assert len(items) == 1 or sum(requests[item][1] for item in items) <= limit
            # Each batch begins with the oldest of those that are left.
            assert items[0] == staying[0]
            staying = [item for item in staying if item not in items]

    _play(scene())

"""Whose turn it is on an actor's device."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from ddray.runtime.pools.device import BATCHES_AHEAD, Device
from tests.patience import PATIENCE_S


def test_the_next_shard_is_made_while_the_last_one_is_used_and_never_between_its_batches() -> None:
    device, made = Device(1), []
    second_is_made = threading.Event()

    def make(order: tuple[int, int]) -> Any:
        made.append(order)
        return np.array(order)

    def shard(k: int) -> list[Any]:
        batches = [*device.batches(make, [(k, i) for i in range(5)])]
        # As a write that takes long: whoever was first waits for the other.
        if made[0][0] == k:
            assert second_is_made.wait(PATIENCE_S)
        second_is_made.set()
        return batches

    with ThreadPoolExecutor(2) as threads:
        results = [*threads.map(shard, (0, 1))]
    assert sorted(made[:5]) == [(made[0][0], i) for i in range(5)]
    assert [[*map(tuple, batches)] for batches in results] == [
        [(k, i) for i in range(5)] for k in (0, 1)
    ]


def test_batches_are_made_few_ahead_and_a_shard_that_is_given_up_leaves_the_device() -> None:
    device, made = Device(1), []

    def make(order: int) -> Any:
        made.append(order)
        if order == 7:
            raise ValueError("no seventh")
        return np.array(order)

    with closing(device.batches(make, range(100))) as batches:
        next(batches)
    assert made == [*range(len(made))] and len(made) <= BATCHES_AHEAD
    with pytest.raises(ValueError, match="no seventh"):
        [*device.batches(make, [5, 6, 7, 8])]
    assert [*device.batches(make, [9])] == [9]


def test_the_model_has_the_plans_threads_on_the_devices_own_thread() -> None:
    device, here = Device(3), threading.get_ident()
    (batch,) = device.batches(lambda _: np.array([torch.get_num_threads()]), [0])
    assert batch.tolist() == [3]
    assert device.load(threading.get_ident) != here

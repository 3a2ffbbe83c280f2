"""What of captions is read where their texts alone are asked for."""

from pathlib import Path

import numpy as np
import pytest

from ddray.errors import ShardError
from ddray.evaluation.feature_set import HeldFeatures
from ddray.evaluation.generators import Generators
from ddray.evaluation.plan import EvaluationPlan, Generator
from ddray.sets.captions import ShardCaptions, caption_parquet, captions_name, read_texts
from ddray.storage.local import LocalStorage

SHARD_ROWS = 10
COUNT = 25
TEXTS = [f"a cat, {i} öre" for i in range(COUNT)]


class WatchedStorage(LocalStorage):
    """Adds up the bytes that are read."""

    def __init__(self, uri: str):
        super().__init__(uri)
        self.bytes_read = 0

    def read(self, name: str) -> bytes:
        data = super().read(name)
        self.bytes_read += len(data)
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        data = super().read_range(name, start, size)
        self.bytes_read += len(data)
        return data


@pytest.fixture
def storage(tmp_path: Path) -> WatchedStorage:
    """Three shards of captions, each row with 256 kB of features."""
    storage, drawn = WatchedStorage(str(tmp_path)), np.random.default_rng(0)
    for k, first in enumerate(range(0, COUNT, SHARD_ROWS)):
        texts = TEXTS[first : first + SHARD_ROWS]
        features = [drawn.normal(size=(16, 4096)).astype(np.float32) for _ in texts]
        records = [f'{{"tag": "{text}"}}' for text in texts]
        part = ShardCaptions(texts, features, records)
        storage.write(captions_name(k), caption_parquet(first, part))
    return storage


def test_who_wants_texts_does_not_fetch_their_features(storage: WatchedStorage) -> None:
    row = Generator("student", "student", COUNT)
    plan = EvaluationPlan(
        generators=(row,), extractors=(), conditioning="text", shard_rows=SHARD_ROWS
    )
    judged = Generators(HeldFeatures(storage, plan), "cpu")
    assert judged.captions(row, range(8, 22)) == TEXTS[8:22]
    assert judged.told(range(23, 27)) == [*TEXTS[23:], *TEXTS[:2]]
    read = read_texts(storage, 2, 3)
    assert [*read.captions] == TEXTS[20:23]
    assert read.features is None
    assert read.records is not None and len(read.records) == 3
    assert storage.bytes_read < sum(storage.list().values()) / 5


def test_texts_that_are_damaged_short_or_missing_are_named(storage: WatchedStorage) -> None:
    with pytest.raises(ShardError, match=r"captions-00002.parquet has 5 of 6 rows; run `ddray"):
        read_texts(storage, 2, 6)
    name = captions_name(1)
    whole = storage.read(name)
    # Far in front of the features; without checksums another text would be read.
    place = whole.index(b"a cat, 1")
    for damaged in (whole[:place] + b"o" + whole[place + 1 :], whole[:-9], b""):
        storage.write(name, damaged)
        with pytest.raises(ShardError, match=r"captions-00001.parquet is damaged \(.*delete it"):
            read_texts(storage, 1)
    storage.delete(name)
    with pytest.raises(ShardError, match=r"captions-00001.parquet is missing; run `ddray sample`"):
        read_texts(storage, 1)

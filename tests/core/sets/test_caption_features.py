"""Features of captions in shards, by a table of four words."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ddray.errors import ConfigError, ShardError
from ddray.sets.caption_features import CaptionFeatures, EncodingPlan, encoded
from ddray.storage.caption_file import CaptionFile
from ddray.text.words import WordEncoder

LENGTH, PLACE = 4, 2
CAPTIONS = ["a red cat", "roof", "A Red  Cat", "a cat on a red roof", "red roof"]


def plan(**other):
    given = {"count": 5, "shard_rows": 2, "text_encoder": "words", "length": LENGTH}
    return EncodingPlan(**{**given, "batch_size": 2, "threads": 1, **other})


@pytest.fixture(scope="module")
def encode():
    vectors = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    pieces = ("_a", "_red", "_cat", "_roof")
    return WordEncoder(pieces, vectors, length=LENGTH, position_width=PLACE)


@pytest.fixture
def captions(tmp_path, encode):
    (tmp_path / "given.txt").write_text("".join(f"{text}\n" for text in CAPTIONS))
    return CaptionFile(str(tmp_path / "given.txt"), length=LENGTH, width=encode.width)


def test_what_is_written_is_a_file_of_captions_with_features(tmp_path, captions, encode):
    features = CaptionFeatures.create(str(tmp_path / "out"), plan(), captions)
    assert features.missing() == [0, 1, 2]
    for k in features.missing():
        texts = CaptionFeatures.open(str(tmp_path / "out")).texts(k)
        features.write_shard(k, texts, encoded(encode, texts))
    assert features.missing() == []
    file = CaptionFile(str(tmp_path / "out" / "shards"), length=LENGTH, width=encode.width)
    assert file.has_features
    rows = [*file.rows(5)]
    assert [row.caption for row in rows] == CAPTIONS
    # Ragged, and what the encoder makes to half precision.
    assert [len(row.features_TD) for row in rows] == [3, 1, 3, 4, 2]
    whole, _ = encode(CAPTIONS)
    for row, expected in zip(rows, whole, strict=True):
        found = row.features_TD
        np.testing.assert_array_equal(found, expected[: len(found)].half().float())
    stored = pq.read_schema(tmp_path / "out" / "shards" / "shard-00000.parquet")
    assert "halffloat" in str(stored.field("features").type)


def test_what_is_there_is_gone_on_with_and_nothing_else(tmp_path, captions):
    uri = str(tmp_path / "out")
    CaptionFeatures.create(uri, plan(), captions)
    assert CaptionFeatures.create(uri, plan(), captions).plan == plan()
    with pytest.raises(ConfigError, match="was begun with length=4, threads=1; give the same"):
        CaptionFeatures.create(uri, plan(length=5, threads=2), captions)
    (tmp_path / "given.txt").write_text("a dog\n" * 5)
    with pytest.raises(ConfigError, match="captions of shard 0 differ"):
        CaptionFeatures.create(uri, plan(), captions)


def test_captions_are_refused_before_anything_is_written(tmp_path, captions):
    with pytest.raises(ConfigError, match="5 rows, but count=6"):
        CaptionFeatures.create(str(tmp_path / "out"), plan(count=6), captions)
    assert not [*(tmp_path / "out").glob("*")]


def test_a_folder_without_a_plan_is_named(tmp_path):
    with pytest.raises(ShardError, match="no features of captions at .*; run `ddray encode` first"):
        CaptionFeatures.open(str(tmp_path))
    for damaged, message in (("{", "is damaged"), ("[]", "is no JSON object")):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ShardError, match=f"manifest.json {message}"):
            CaptionFeatures.open(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"count": 3}))
    with pytest.raises(ShardError, match="no features of captions"):
        CaptionFeatures.open(str(tmp_path))


def test_batches_cover_a_shard():
    assert plan(shard_rows=5).batches(0) == [range(0, 2), range(2, 4), range(4, 5)]


def test_features_that_half_precision_does_not_hold_are_refused():
    def large(captions):
        return torch.full((1, 2, 3), 1e5), torch.ones(1, 2, dtype=torch.int64)

    with pytest.raises(ConfigError, match="too large for float16"):
        encoded(large, ["a cat"])

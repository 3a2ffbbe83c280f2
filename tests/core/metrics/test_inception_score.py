"""Facts about the Inception Score: closed forms, splits, sums of parts."""

import math

import numpy as np
import pytest
import torch

from ddray.errors import ConfigError
from ddray.metrics.inception_score import ScoreSums, adm_splits, fidelity_splits


def score(logits, splits=None):
    splits = np.zeros(len(logits), np.int64) if splits is None else splits
    return ScoreSums.of(logits, splits, int(splits.max()) + 1).score()


def test_sure_of_every_image_and_every_class_seen_is_the_number_of_classes():
    assert score(torch.eye(7) * 1000) == pytest.approx(7)


def test_sure_of_one_class_alone_and_sure_of_nothing_are_one():
    assert score(torch.eye(7)[[2] * 5] * 1000) == pytest.approx(1)
    assert score(torch.zeros(5, 7)) == pytest.approx(1)


def test_two_kinds_of_images():
    # p = (a, 1 - a) and (1 - a, a): exp(log 2 - H(a)).
    a = 0.9
    logits = torch.tensor([[a, 1 - a], [1 - a, a]]).log()
    entropy = -(a * math.log(a) + (1 - a) * math.log(1 - a))
    assert score(logits) == pytest.approx(2 * math.exp(-entropy), rel=1e-6)


def test_the_score_is_the_mean_over_splits():
    logits = torch.cat([torch.eye(4)[:2], torch.eye(4)]) * 1000
    assert score(logits, np.array([0, 0, 1, 1, 1, 1])) == pytest.approx((2 + 4) / 2)


def test_adm_takes_5000_in_a_row_and_what_is_left():
    splits = adm_splits(12_000)
    assert np.bincount(splits).tolist() == [5000, 5000, 2000]
    assert (np.diff(splits) >= 0).all()


def test_torch_fidelity_takes_ten_shuffled_splits():
    splits = fidelity_splits(1003)
    assert sorted(np.bincount(splits)) == [100] * 7 + [101] * 3
    assert (np.diff(splits) < 0).any()
    with pytest.raises(ConfigError, match="10 splits need at least as many images, got 9"):
        fidelity_splits(9)


def test_sums_of_parts_are_those_of_the_whole():
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    splits = fidelity_splits(60)
    whole = ScoreSums.of(logits, splits, 10)
    parts = [ScoreSums.of(logits[a:b], splits[a:b], 10) for a, b in ((0, 1), (1, 40), (40, 60))]
    merged = parts[0] + parts[1] + parts[2]
    assert merged.counts.tolist() == whole.counts.tolist()
    assert merged.score() == pytest.approx(whole.score(), rel=1e-12)


def test_a_split_without_images_is_refused():
    sums = ScoreSums.of(torch.zeros(2, 3), np.array([0, 2]), 3)
    with pytest.raises(ConfigError, match="1 of 3 splits of the Inception Score have no images"):
        sums.score()

"""Facts about precision, recall, density and coverage: sets that are made to have them."""

import numpy as np
import pytest

from ddray.errors import ConfigError
from ddray.metrics import precision_recall
from ddray.metrics.precision_recall import compare_manifolds


def cluster(centre, count=10):
    """Whole numbers on a line through a centre: distances without rounding."""
    rows = np.zeros((count, 3), np.float32)
    rows[:, 0] = np.arange(count)
    rows[:, 1] = centre
    return rows


def test_the_same_set_has_all_of_them():
    found = compare_manifolds(cluster(0), cluster(0))
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_sets_far_apart_have_none():
    assert compare_manifolds(cluster(0), cluster(1000)) == (0, 0, 0, 0)


def test_images_of_half_of_the_real_ones():
    real = np.concatenate([cluster(0), cluster(1000)])
    found = compare_manifolds(cluster(0), real)
    assert (found.precision, found.recall, found.coverage) == (1, 0.5, 0.5)


def test_images_of_which_half_are_real():
    generated = np.concatenate([cluster(0), cluster(500)])
    found = compare_manifolds(generated, cluster(0))
    assert (found.precision, found.recall, found.coverage) == (0.5, 1, 1)
    assert found.density == pytest.approx(compare_manifolds(cluster(0), cluster(0)).density / 2)


def test_density_counts_the_balls_of_real_images_that_hold_an_image():
    # Real: 0..9. Radii to the fifth neighbour: 5 5-1 ... at the ends, 3 inside; strictly within.
    real, radii = np.arange(10.0), np.array([5, 4, 3, 3, 3, 3, 3, 3, 4, 5])
    generated = cluster(0)[[4]].repeat(6, 0)
    held = (np.abs(4 - real) < radii).sum()
    assert compare_manifolds(generated, cluster(0)).density == pytest.approx(held / 5)


def test_one_outlier_flatters_precision_more_than_density():
    outlier = np.concatenate([cluster(0), np.float32([[0, 1e4, 0]])])
    far = cluster(600)
    assert compare_manifolds(far, outlier).precision == 1
    assert compare_manifolds(far, outlier).density <= 0.2


def test_blocks_do_not_change_it(monkeypatch):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(70, 5)).astype(np.float16)
    b = (rng.normal(size=(50, 5)) + 0.5).astype(np.float16)
    whole = compare_manifolds(a, b)
    monkeypatch.setattr(precision_recall, "_BLOCK_NUMBERS", 350)
    assert compare_manifolds(a, b) == whole


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="take up to 5 neighbours .* the reference have 5 images"):
        compare_manifolds(cluster(0), cluster(0, 5))

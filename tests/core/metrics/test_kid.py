"""Facts about the kernel distance: closed forms, no bias, subsets."""

import numpy as np
import pytest

from ddray.errors import ConfigError
from ddray.metrics.kid import kernel_distance, squared_mmd


def test_the_closed_form_of_few_points():
    # D = 1, kernel (x y + 1)^3.
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    pairs_a, pairs_b, across = 1, 7**3, (1 + 1 + 3**3 + 4**3) / 4
    assert squared_mmd(a, b) == pytest.approx(pairs_a + pairs_b - 2 * across)


def test_it_has_no_bias_for_equal_distributions():
    rng = np.random.default_rng(0)
    found = [squared_mmd(*rng.normal(size=(2, 10, 4))) for _ in range(2000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0 < max(found)


def test_it_sees_a_shift_of_the_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300, 4))
    assert squared_mmd(a, b + 1) > 10 * abs(squared_mmd(a, b))


def test_all_images_in_every_subset_are_the_whole():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 4)).astype(np.float16)
    found = kernel_distance(a, b, subsets=3, subset_size=20)
    assert found == pytest.approx(squared_mmd(a, b), rel=1e-9)
    assert kernel_distance(a, b, subset_size=5) == kernel_distance(a, b, subset_size=5)


def test_too_few_images_are_refused():
    rows = np.zeros((999, 2))
    with pytest.raises(ConfigError, match="subsets of 1000 images, and the samples have 999"):
        kernel_distance(rows, rows)
    with pytest.raises(ConfigError, match="needs at least 2 images, got 1 and 999"):
        squared_mmd(rows[:1], rows)

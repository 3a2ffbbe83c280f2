"""Pictures hold what was put in, and what cannot be shown is refused."""

import numpy as np
import pytest

from ddray.errors import ConfigError
from ddray.report.pictures import grid, labelled_grid, reduced, to_uint8
from tests.core.tiny import random_images as digits


def test_to_uint8_rounds_to_nearest_and_clips():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1, 7], np.float32)
    assert to_uint8(values.reshape(1, 1, 1, 7)).tolist() == [[[0, 0, 0, 1, 127, 255, 255]]]


def test_to_uint8_moves_colour_last():
    images = digits(2, channels=3)
    assert to_uint8(images).shape == (2, 8, 8, 3)
    assert to_uint8(images)[1, 2, 3].tolist() == np.rint(images[1, :, 2, 3] * 255).tolist()
    assert to_uint8(digits(2)).shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8)), r"shape \(2, 8, 8\)"),
        (np.zeros((1, 4, 8, 8)), r"\[N, 1 or 3, H, W\]"),
        (np.zeros((0, 1, 8, 8)), "N >= 1"),
        (np.zeros((1, 1, 8, 8), np.uint8), "uint8; floats"),
        (np.full((1, 1, 8, 8), np.nan), "NaN"),
    ],
)
def test_images_that_cannot_be_shown_are_refused(images, message):
    with pytest.raises(ConfigError, match=message):
        to_uint8(images)


def test_grid_has_every_pixel_where_it_belongs():
    images = np.arange(1, 13).reshape(3, 1, 2, 2) / 255
    # Three 2x2 tiles in two columns, each pixel doubled, one pixel of black around each.
    tile = [np.kron(image[0] * 255, np.ones((2, 2))) for image in images]
    wanted = np.zeros((11, 11))
    wanted[1:5, 1:5], wanted[1:5, 6:10], wanted[6:10, 1:5] = tile
    picture = grid(images, 2, scale=2, pad=1)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), wanted)
    assert np.array_equal(np.asarray(grid(images, 2, scale=2, pad=1, invert=True)), 255 - wanted)


def test_grid_of_colour_and_without_padding():
    picture = grid(digits(4, channels=3), 2, pad=0)
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(picture)[8:, :8], to_uint8(digits(4, channels=3))[2])


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"scale": 0}, {"pad": -1}])
def test_grid_refuses_sizes_out_of_range(wrong):
    with pytest.raises(ConfigError, match="least allowed"):
        grid(digits(1), **{"columns": 1, **wrong})


def test_labelled_grid_keeps_the_columns_of_all_rows_below_each_other():
    one = np.ones((4, 1, 8, 8))
    picture = np.asarray(labelled_grid([("a", one), ("longer name", one)], ["0", "1"], pad=3))
    white = (picture == 255).all(axis=2)
    assert white.sum() == 2 * 4 * 16 * 16
    used = np.flatnonzero(white.any(axis=0))
    assert used.tolist() == [*range(used[0], used[0] + 16), *range(used[0] + 19, used[0] + 35)]
    assert picture.min() < 80, "the labels are drawn"


def test_labelled_grid_inverts_images_only_and_takes_colour_beside_grey():
    rows = [("grey", np.zeros((2, 1, 8, 8))), ("colour", np.zeros((2, 3, 8, 8)))]
    white = (np.asarray(labelled_grid(rows, invert=True)) == 255).all(axis=2)
    assert white.sum() == 2 * 2 * 16 * 16


def _headings(words, scale):
    """Rows of pixels that headings of two columns take, and the picture's width."""
    picture = labelled_grid([("a", np.ones((2, 1, 8, 8)))], words, scale=scale)
    white = (np.asarray(picture) == 255).all(axis=2)
    return int(np.flatnonzero(white.any(axis=1))[0]), picture.width


def test_labelled_grid_writes_a_long_heading_in_three_lines_and_cuts_what_is_longer():
    one, width = _headings(["a", "b"], 10)
    two, same = _headings(["red firefighter", "b"], 10)
    three, _ = _headings(["woman firefighter dark skin tone and more", "b"], 10)
    most, _ = _headings(["a b c d e f g h i j k l m n o p q r s t u v w x y z", "b"], 10)
    assert one < two < three == most
    assert same == width
    assert _headings(["indivisibly" * 5, "b"], 10) == (one, width)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], (), "one common size"),
        ([("a", digits(1)), ("b", digits(1, size=9))], (), r"\(8, 8\), \(9, 9\)"),
        ([("a", digits(2))], ("x", "y", "z"), "3 column labels for 2 columns"),
    ],
)
def test_labelled_grid_refuses_what_does_not_fit(rows, labels, message):
    with pytest.raises(ConfigError, match=message):
        labelled_grid(rows, labels, columns=2)


def test_large_images_are_reduced_by_a_whole_number_and_small_ones_left():
    images = np.linspace(0, 1, 2 * 3 * 40 * 20, dtype=np.float32).reshape(2, 3, 40, 20)
    assert reduced(images, 40) is images
    small = reduced(images, 16)
    assert small.shape == (2, 3, 14, 7)
    assert np.abs(small[:, :, 0, 0] - images[:, :, :3, :3].mean((2, 3))).max() < 2 / 255
    assert reduced(images[:, :1], 16).shape == (2, 1, 14, 7)

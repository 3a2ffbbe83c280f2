"""Facts about what a feature network is shown: rounding in one place, published resizings."""

import numpy as np
import pytest
import torch

from ddray.errors import ConfigError
from ddray.metrics.pixels import (
    as_pixels,
    eight_bit,
    resize_bicubic,
    resize_pytorch_fid,
    resize_tensorflow,
)
from ddray.report.pictures import to_uint8


def test_images_are_rounded_as_files_of_them_are():
    halves = (torch.arange(256) + 0.5) / 255
    images = torch.cat([torch.rand(500, generator=torch.Generator().manual_seed(0)), halves])
    images = torch.cat([images, torch.tensor([-1.0, 2.0, 1 / 510, 3 / 510])])
    rounded = eight_bit(images.reshape(1, 1, -1, 1)).numpy()
    np.testing.assert_array_equal(rounded[:, 0], to_uint8(images.reshape(1, 1, -1, 1).numpy()))
    assert rounded.min() == 0 and rounded.max() == 255


def test_channels_may_come_first_or_last():
    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    assert torch.equal(as_pixels(images), images.permute(0, 3, 1, 2))
    assert torch.equal(as_pixels(images.permute(0, 3, 1, 2)), images.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4), r"images are torch.float32; uint8 is needed: round them by eig"),
        (torch.zeros(2, 4, 4, 4).byte(), r"have shape \[2, 4, 4, 4\]; colour images are needed"),
        (torch.zeros(2, 1, 4, 4).byte(), r"have shape \[2, 1, 4, 4\]; colour images are needed"),
        (torch.zeros(4, 4, 3).byte(), r"have shape \[4, 4, 3\]; colour images are needed"),
    ],
)
def test_images_that_are_not_8_bit_colour_are_refused(images, message):
    with pytest.raises(ConfigError, match=message):
        as_pixels(images)


def test_tensorflow_samples_from_corners_and_pytorch_fid_from_centres():
    row = torch.tensor([0.0, 10.0]).expand(1, 3, 2, 2)
    # A place k of 4 lies at k / 2 from the corner; at (k + 1/2) / 2 - 1/2 between centres.
    assert resize_tensorflow(row, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]
    assert resize_pytorch_fid(row, 4)[0, 0, 0].tolist() == [0, 2.5, 7.5, 10]


def test_bicubic_stays_a_pixel():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 255
    resized = resize_bicubic(edge, 13)
    assert resized.shape == (1, 3, 13, 13)
    assert resized.min() == 0 and resized.max() == 255

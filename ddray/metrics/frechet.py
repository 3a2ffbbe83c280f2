"""Frechet distance between Gaussians, and the statistics of features that it is taken of.

Shapes: N images, D features.
"""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from ddray.errors import ConfigError, one_line
from ddray.file_kind import explained, kind_of
from ddray.storage import open_beside


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features, in float64.

    Attributes:
        count: number of images N.
        mean: float64 [D].
        covariance: float64 [D, D], normalised by N - 1.
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of features [N, D].

        Raises:
            ConfigError: for fewer than two rows, which have no covariance.
        """
        if len(features) < 2:
            raise ConfigError(f"a Frechet distance needs at least 2 images, got {len(features)}")
        rows = features.double().cpu().numpy()
        return cls(len(rows), rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)))

    @classmethod
    def merged(cls, sums: Iterable["FeatureSums"]) -> "FeatureStatistics":
        """Statistics of all images of some sums.

        Raises:
            ConfigError: for fewer than two images, which have no covariance.
        """
        return reduce(FeatureSums.__add__, sums).statistics()

    @classmethod
    def load(cls, uri: str) -> "FeatureStatistics":
        """Read a file as `to_bytes` makes it, or as pytorch-fid does, which names no count.

        Raises:
            ConfigError: if it is no such file.
            StorageError: if it cannot be read.
        """
        storage, name = open_beside(uri)
        data = storage.read(name)
        try:
            with np.load(io.BytesIO(data)) as file:
                count, mean, covariance = int(file.get("count", 0)), file["mu"], file["sigma"]
            check_moments(mean, covariance)
        except Exception as error:  # one flipped bit makes np.load fail in any way
            refusal = f"{uri} is no file of statistics"
            raise ConfigError(explained(refusal, data, error, "(.npz)")) from error
        return cls(count, mean.astype(np.float64), covariance.astype(np.float64))

    def distance(self, other: "FeatureStatistics") -> float:
        """Frechet distance to other features' statistics."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def to_bytes(self, **notes: str) -> bytes:
        """As an .npz with mu, sigma and count, which pytorch-fid reads as well.

        Args:
            **notes: what else stands in the file, such as the extractor's fingerprint.
        """
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: np.array(note) for name, note in notes.items()}
        np.savez(stream, mu=self.mean, sigma=self.covariance, count=self.count, **arrays)
        return stream.getvalue()

    def tensors(self) -> dict[str, Tensor]:
        """As tensors, for a safetensors file."""
        return {
            "reference.count": torch.tensor(self.count),
            "reference.mean": torch.from_numpy(self.mean),
            "reference.covariance": torch.from_numpy(self.covariance),
        }


@dataclass(frozen=True)
class FeatureSums:
    """What can be merged into statistics, in float64.

    Attributes:
        count: number of images N.
        mean: float64 [D].
        scatter: float64 [D, D], sum of (x - mean) (x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Tensor) -> "FeatureSums":
        """Sums of features [N, D], N >= 1."""
        rows = features.double().cpu().numpy()
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Sums of both, without the cancellation of raw second moments.

        Floating-point addition is not associative: sums that must have the same bits every time
        are added in one order, that of their shards.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        count, shift = self.count + other.count, other.mean - self.mean
        # In place: with 2048 features every copy is 34 MB.
        scatter = np.outer(shift, shift)
        scatter *= self.count * other.count / count
        scatter += self.scatter
        scatter += other.scatter
        return FeatureSums(count, self.mean + shift * (other.count / count), scatter)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance.

        Raises:
            ConfigError: for fewer than two images, which have no covariance.
        """
        if self.count < 2:
            raise ConfigError(f"a Frechet distance needs at least 2 images, got {self.count}")
        return FeatureStatistics(self.count, self.mean, self.scatter / (self.count - 1))

    def to_bytes(self, extractor: str) -> bytes:
        """As a safetensors file.

        Args:
            extractor: fingerprint of what made the features.
        """
        arrays = {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}
        return save(arrays, {"extractor": extractor})

    @classmethod
    def from_bytes(cls, data: bytes, extractor: str) -> "FeatureSums":
        """Read what `to_bytes` made.

        Raises:
            ConfigError: if it is damaged, or of another extractor.
        """
        try:
            arrays, notes = arrays_and_notes(data)
            found = notes["extractor"]
            sums = cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])
            check_moments(sums.mean, sums.scatter)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            kind = kind_of(data)
            told = kind.name if kind and "safetensors" not in kind.name else one_line(error)
            raise ConfigError(f"damaged ({told})") from error
        if found != extractor:
            raise ConfigError(f"made by another extractor ({found[:12]}, not {extractor[:12]})")
        return sums


def add_layers(sums: dict[str, FeatureSums], own: Mapping[str, FeatureSums]) -> None:
    """Add sums of some layers to those that are there, in place."""
    for layer, more in own.items():
        sums[layer] = sums[layer] + more if layer in sums else more


def arrays_and_notes(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of a safetensors file in memory, and the notes in its header.

    Raises:
        SafetensorError, ValueError, KeyError, TypeError, RecursionError: if it is damaged.
    """
    arrays = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header["__metadata__"]


Array = npt.NDArray[np.float64]


def check_moments(mean: np.ndarray, square: np.ndarray) -> None:
    """Refuse what are not finite numbers [D] and [D, D].

    Raises:
        ValueError: for other shapes, or anything that is no finite number.
    """
    if mean.ndim != 1 or square.shape != (len(mean), len(mean)):
        raise ValueError(f"shapes {mean.shape} and {square.shape} are not [D] and [D, D]")
    if any(part.dtype.kind not in "fiu" or not np.isfinite(part).all() for part in (mean, square)):
        raise ValueError("they are not all finite numbers")


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians.

    Heusel et al., arXiv 1706.08500, equation 6. With A = F F^T and B = G G^T the trace of the root
    is the sum of the singular values of F^T G. They cannot turn complex, as a general matrix root
    can, and they are exact to 1e-15 where features outnumber images: square roots of eigenvalues
    that should be 0 are off by 1e-8 each.

    Args:
        mean_a: float64 [D].
        cov_a: float64 [D, D], A.
        mean_b: float64 [D].
        cov_b: float64 [D, D], B.

    Returns:
        The distance, 0 or more; 0 for the same Gaussian.
    """
    # One factor at a time: each of 2048 features is 34 MB.
    cross = _factor(cov_a).T @ _factor(cov_b)
    roots = np.linalg.svd(cross, compute_uv=False)
    shift = np.square(mean_a - mean_b).sum()
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()
    return float(shift + spread)


def _factor(covariance: Array) -> Array:
    """F with F F^T = the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    vectors *= np.sqrt(values.clip(0))
    return vectors

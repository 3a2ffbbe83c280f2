"""How good images are: Frechet distance between feature statistics, and class accuracy.

`fd_digits` is the Frechet distance (Heusel et al., arXiv 1706.08500, equation 6) between the
bundled digit classifier's features of generated images and of held-out real digits. It is not FID,
which is defined on Inception features. Imports ddray.checkpoint, errors, model,
models.digits_classifier and storage.

Shapes: N images, D features.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from ddray.checkpoint import fingerprint, load_folder, load_into
from ddray.errors import ConfigError, one_line
from ddray.model import Model
from ddray.models.digits_classifier import DigitsClassifier
from ddray.storage import open_storage


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
    def of(cls, classifier: DigitsClassifier, images: Tensor) -> "FeatureStatistics":
        """Statistics of images [N, 1, 28, 28] in [0, 1], as the 8-bit pixels of a file."""
        return cls.from_features(classify(classifier, images)[0])

    @classmethod
    def merged(cls, sums: Iterable["FeatureSums"]) -> "FeatureStatistics":
        """Statistics of all images of some sums.

        Raises:
            ConfigError: for fewer than two images, which have no covariance.
        """
        total = reduce(FeatureSums.__add__, sums)
        if total.count < 2:
            raise ConfigError(f"a Frechet distance needs at least 2 images, got {total.count}")
        return cls(total.count, total.mean, total.scatter / (total.count - 1))

    @classmethod
    def load(cls, uri: str) -> "FeatureStatistics":
        """Read a file as `to_bytes` makes it, or as pytorch-fid does, which names no count.

        Raises:
            ConfigError: if it is no such file.
            StorageError: if it cannot be read.
        """
        folder, _, name = uri.rpartition("/")
        data = open_storage(folder or ".").read(name)
        try:
            with np.load(io.BytesIO(data)) as file:
                return cls(int(file.get("count", 0)), file["mu"], file["sigma"])
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{uri} is no file of statistics: {one_line(error)}") from error

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
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Sums of both, without the cancellation of raw second moments.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        count, shift = self.count + other.count, other.mean - self.mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return FeatureSums(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + between,
        )

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
            arrays = load(data)
            size = int.from_bytes(data[:8], "little")
            found = json.loads(data[8 : 8 + size])["__metadata__"]["extractor"]
            sums = cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"damaged ({one_line(error)})") from error
        if found != extractor:
            raise ConfigError(f"made by another extractor ({found[:12]}, not {extractor[:12]})")
        return sums


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians.

    The trace of the root is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2),
    which is symmetric and positive: no complex root has to be cut off, as it must be with a general
    matrix root.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = np.square(a.mean - b.mean).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(shift + spread)


def classify(classifier: DigitsClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and classes [N] of images [N, 1, 28, 28] in [0, 1], rounded to 8 bits."""
    features, classes = [], []
    with torch.inference_mode():
        for chunk in images.split(500):
            pixels = (chunk.clamp(0, 1) * 255).round() / 255
            features.append(classifier.features(pixels))
            classes.append(classifier.classes(features[-1]).argmax(-1))
    return torch.cat(features), torch.cat(classes)


def code_features(codes_BLE: Tensor) -> Tensor:
    """Mean and deviation of an image's codes [B, 2E]: features that need no outside network."""
    return torch.cat((codes_BLE.mean(1), codes_BLE.std(1)), 1)


class DigitsMetric:
    """The bundled classifier and the statistics of the held-out digits, ready to judge images.

    Args:
        folder: model folder of the classifier.
    """

    def __init__(self, folder: str | Path):
        self.card, state, _ = load_folder(folder)
        self.classifier = DigitsClassifier()
        weights = {k: v for k, v in state.items() if not k.startswith("reference.")}
        load_into(self.classifier, weights, str(folder))
        self.fingerprint = fingerprint(self.classifier)
        self.reference = FeatureStatistics(
            int(state["reference.count"]),
            state["reference.mean"].numpy(),
            state["reference.covariance"].numpy(),
        )

    def sums(self, pixels: np.ndarray) -> FeatureSums:
        """Mergeable sums of the features of pixels uint8 [N, 28, 28]."""
        images = torch.from_numpy(pixels)[:, None].float() / 255
        return FeatureSums.of(classify(self.classifier, images)[0])

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Judge images against the class each was asked for.

        Args:
            images: float [N, 1, 28, 28] in [0, 1].
            labels: int64 [N].

        Returns:
            `fd_digits` (lower is better, 0 at best) and `class_accuracy` in [0, 1].
        """
        features, classes = classify(self.classifier, images)
        return {
            "fd_digits": frechet_distance(
                self.reference, FeatureStatistics.from_features(features)
            ),
            "class_accuracy": float((classes == labels.to(classes.device)).float().mean()),
        }


def makes_digits(model: Model) -> bool:
    """Whether images are grey 28x28 of ten classes: fd_digits is defined on those."""
    image = model.decode(torch.zeros(1, model.num_tokens, dtype=torch.long))
    return (model.num_classes, *image.shape[1:]) == (10, 1, 28, 28)

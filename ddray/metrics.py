"""How good images are: Frechet distance between feature statistics, and class accuracy.

`fd_digits` is the Frechet distance (Heusel et al., arXiv 1706.08500, equation 6) between the
bundled digit classifier's features of generated images and of held-out real digits. It is not FID,
which is defined on Inception features. Imports ddray.checkpoint, ddray.errors and
ddray.models.digits_classifier.

Shapes: N images, D features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddray.checkpoint import fingerprint, load_folder, load_into
from ddray.errors import ConfigError
from ddray.models.digits_classifier import DigitsClassifier


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

    def tensors(self) -> dict[str, Tensor]:
        """As tensors, for a safetensors file."""
        return {
            "reference.count": torch.tensor(self.count),
            "reference.mean": torch.from_numpy(self.mean),
            "reference.covariance": torch.from_numpy(self.covariance),
        }


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

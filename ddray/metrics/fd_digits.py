"""The metric `fd_digits`, and the accuracy of classes: what the bundled classifier says of digits.

`fd_digits` is the Frechet distance between the classifier's features of generated images and of
held-out real digits. It is not FID, which is defined on Inception features.

Shapes: N images.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddray.method.model import Model
from ddray.metrics.digits_classifier import DigitsClassifier
from ddray.metrics.frechet import FeatureStatistics, FeatureSums
from ddray.metrics.network import LOGITS, POOL, FeatureNetwork
from ddray.metrics.pixels import eight_bit
from ddray.metrics.reference import Reference
from ddray.storage.checkpoint import fingerprint, load_folder, load_into


def classify(classifier: DigitsClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and classes [N] of images [N, 1, 28, 28] in [0, 1], rounded to 8 bits."""
    features, classes = [], []
    with torch.inference_mode():
        for chunk in images.split(500):
            features.append(classifier.features(eight_bit(chunk).float() / 255))
            classes.append(classifier.classes(features[-1]).argmax(-1))
    return torch.cat(features), torch.cat(classes)


def statistics_of(classifier: DigitsClassifier, images: Tensor) -> FeatureStatistics:
    """Statistics of images [N, 1, 28, 28] in [0, 1], as the 8-bit pixels of a file."""
    return FeatureStatistics.from_features(classify(classifier, images)[0])


class DigitsNetwork(FeatureNetwork):
    """The bundled digit classifier: features before its last layer, and logits of ten classes.

    Args:
        folder: model folder of the classifier.
        device: where it runs.

    Attributes:
        reference: statistics of the held-out digits.
        card: what the folder says of the classifier.
    """

    name = "digits"
    layers = {POOL: 64, LOGITS: 10}
    channels = 1

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        metric = DigitsMetric(folder)
        self.card = metric.card
        super().__init__(metric.classifier, metric.fingerprint, device)
        self.reference = Reference(
            "the held-out digits", {POOL: metric.reference}, metric.fingerprint, self.name
        )

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        net: Any = self.module
        pool = net.features(pixels / 255)
        return {POOL: pool, LOGITS: net.classes(pool)}


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
            "fd_digits": self.reference.distance(FeatureStatistics.from_features(features)),
            "class_accuracy": float((classes == labels.to(classes.device)).float().mean()),
        }


def makes_digits(model: Model) -> bool:
    """Whether images are grey 28x28 of ten classes: fd_digits is defined on those."""
    image = model.decode(torch.zeros(1, model.num_tokens, dtype=torch.long))
    return (model.num_classes, *image.shape[1:]) == (10, 1, 28, 28)

"""Perceptual distance of decoded images, as a loss: a wrong token costs what it does to the image.

The student's sequence and the teacher's are decoded, and features of the two images are compared:
those of the tokenizer's own encoder, which need no other weights, or those of a VGG-16 with heads
that were fitted to human judgement (LPIPS, Zhang et al., arXiv 1801.03924; extra `lpips`). Either
way features are scaled to length one at every place, as LPIPS does, so that neither loud channels
nor loud images count for more. Tokens enter by straight-through (ddray.distillation.adversary), not
as expected codes: an expected code lies between codes, where the decoder was never trained, and
decodes to a blur that inference does not show.

Shapes: B batch, X any channel count, H and W pixels or cells.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.adversary import sequence_codes
from ddray.distillation.losses import Prediction, computing_in, mean_where
from ddray.errors import ConfigError
from ddray.locations import local_file
from ddray.method.teacher import Teacher
from ddray.models.autoencoder import Encoder
from ddray.storage.checkpoint import load_into, read_weights

# The heads of LPIPS were fitted to squares of so many pixels; smaller images are enlarged to it.
_LPIPS_SIDE = 64


def _squared_difference(own_BXHW: Tensor, theirs_BXHW: Tensor) -> Tensor:
    """Of features scaled to length one; where there are none, they stay zero."""
    return (F.normalize(own_BXHW, dim=1) - F.normalize(theirs_BXHW, dim=1)).square()


def encoder_distance(encoder: Encoder, images_BXHW: Tensor, targets_BXHW: Tensor) -> Tensor:
    """Squared distance of features of length one, the mean over places and then over depths.

    Args:
        encoder: whose features after every level and after the middle are compared.
        images_BXHW: float32, about [-1, 1].
        targets_BXHW: likewise.

    Returns:
        float32 [B], from 0 to 4: twice one minus the mean cosine of the angle between features.
    """
    both = zip(encoder.features(images_BXHW), encoder.features(targets_BXHW), strict=True)
    return torch.stack([_squared_difference(*pair).sum(1).mean((1, 2)) for pair in both]).mean(0)


class Lpips:
    """LPIPS with a VGG-16, the backbone that its authors advise for optimization.

    Args:
        file: state dict of `lpips.LPIPS(net="vgg")`: backbone and heads.
        device: where it runs.

    Raises:
        CheckpointError: if the file is damaged or holds other weights.
        ConfigError: without the package lpips, or if there is no such file.
    """

    def __init__(self, file: str | Path, device: torch.device | str = "cpu"):
        try:
            import lpips
        except ImportError as error:
            raise ConfigError(
                "perceptual.distance=lpips needs the package lpips; install ddray[lpips], or take "
                "perceptual.distance=tokenizer"
            ) from error
        file = local_file(file)
        if not Path(file).is_file():
            raise ConfigError(
                f"perceptual.weights_file={file} does not exist or is no file; "
                "docs/distilling.md says how to write it"
            )
        with warnings.catch_warnings(), torch.device("meta"):
            # It builds its backbone by arguments that torchvision has since renamed.
            warnings.simplefilter("ignore", UserWarning)
            network = lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
        load_into(network, read_weights(file), f"perceptual.weights_file={file}")
        self._network: Any = network.to(device)

    def __call__(self, images_BXHW: Tensor, targets_BXHW: Tensor) -> Tensor:
        """Distances float32 [B] of images of 1 or 3 channels, about [-1, 1]."""
        own, theirs = map(self._features, (images_BXHW, targets_BXHW))
        # Not by the network's own forward: the gradient of its square root is NaN at a place
        # without features.
        depths = [
            head(_squared_difference(*pair)).mean((1, 2, 3))
            for head, *pair in zip(self._network.lins, own, theirs, strict=True)
        ]
        return torch.stack(depths).sum(0)

    def _features(self, images_BXHW: Tensor) -> tuple[Tensor, ...]:
        network = self._network
        return tuple(network.net(network.scaling_layer(_as_photographs(images_BXHW))))


def _as_photographs(images_BXHW: Tensor) -> Tensor:
    """Three channels, and no side below `_LPIPS_SIDE`."""
    height, width = images_BXHW.shape[2:]
    if min(height, width) < _LPIPS_SIDE:
        factor = _LPIPS_SIDE / min(height, width)
        size = (round(factor * height), round(factor * width))
        images_BXHW = F.interpolate(images_BXHW, size=size, mode="bilinear")
    return images_BXHW.expand(-1, 3, -1, -1)


def check_lpips(config: DistillConfig) -> None:
    """Read the LPIPS weights of a config once, if it has any, to refuse them before work starts.

    Raises:
        CheckpointError: as `Lpips`.
        ConfigError: as `Lpips`.
    """
    if config.perceptual.weights_file is not None:
        Lpips(config.perceptual.weights_file)


class Perceptual:
    """The distance of a student's images to the teacher's; a critic that learns nothing itself.

    Args:
        config: the job; of it `perceptual`.
        teacher: on the device of the training.
        code_precision: with which the student is going to be read.

    Raises:
        CheckpointError: as `Lpips`.
        ConfigError: as `Lpips`.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, *, code_precision: float):
        self._weight, self._precision = config.perceptual.weight, code_precision
        self._computes_in = config.precision
        self._codebook, self._tokenizer = teacher.codebook, teacher.tokenizer.module
        file = config.perceptual.weights_file
        self._distance: Callable[[Tensor, Tensor], Tensor] = (
            partial(encoder_distance, self._tokenizer.encoder)
            if file is None
            else Lpips(file, teacher.device)
        )

    def loss(self, prediction: Prediction, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean distance of rows that were asked for something.

        Args:
            prediction: both heads, as the distillation loss of this batch made them.
            share: unused, as there is no step of its own.

        Returns:
            Scalar with gradient towards the student, weighted; and the distance to log.
        """
        own_BLE, theirs_BLE = sequence_codes(prediction, self._codebook, self._precision)
        with computing_in(self._computes_in, own_BLE.device):
            with torch.no_grad():
                targets = self._images(theirs_BLE)
            distance_B = self._distance(self._images(own_BLE), targets)
        distance = mean_where(prediction.asked_BL.any(1), distance_B)
        return self._weight * distance, {"perceptual": distance.detach()}

    def _images(self, codes_BLE: Tensor) -> Tensor:
        """Decoded images [B, X, H, W], not clamped: a clamped pixel would have no gradient."""
        latent = self._tokenizer.post_quant_conv(self._tokenizer.decoder_input(codes_BLE))
        images: Tensor = self._tokenizer.decoder(latent)
        return images

    def update(self, average: Callable[[Iterable[Tensor]], None] = lambda gradients: None) -> None:
        """Nothing: it has no weights of its own."""

    def discard(self) -> None:
        """Nothing, likewise."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go on from: what it knows is the teacher's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

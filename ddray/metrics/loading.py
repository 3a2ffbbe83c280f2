"""Feature networks by name, each loaded with what it alone needs: torchvision, or transformers."""

from pathlib import Path

import torch

from ddray.errors import ConfigError
from ddray.metrics.network import FeatureNetwork

NETWORKS = (
    "inception",
    "inception-tensorflow",
    "efficientnet",
    "dinov2",
    "clip",
    "digits",
    "emoji",
)


def load_network(
    name: str,
    source: str | Path | None = None,
    *,
    any_weights: bool = False,
    device: str | torch.device = "cpu",
) -> FeatureNetwork:
    """The network of a name.

    Args:
        name: of NETWORKS; "inception" resizes as pytorch-fid, "inception-tensorflow" as ADM's
            evaluator and torch-fidelity.
        source: file of weights, or folder of DINOv2, CLIP, the digit classifier or the judge of
            emoji; None for where the weights of Inception and EfficientNet lie by themselves.
        any_weights: of Inception, whether a file of another sha256 is taken.
        device: where it runs.

    Raises:
        ConfigError: for another name, a missing source, or a package that is not installed.
        CheckpointError: if the source is damaged, or of another network.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network {name!r} is not one of {', '.join(NETWORKS)}")
    if name.startswith("inception"):
        from ddray.metrics.inception import Inception

        resize = "pytorch-fid" if name == "inception" else "tensorflow"
        return Inception(source, resize=resize, any_weights=any_weights, device=device)
    if name == "efficientnet":
        from ddray.metrics.efficientnet import EfficientNet

        return EfficientNet(source, device=device)
    if source is None:
        raise ConfigError(f"{name} needs the folder that it was saved to; give --{name} FOLDER")
    if name == "digits":
        from ddray.metrics.fd_digits import DigitsNetwork

        return DigitsNetwork(source, device)
    if name == "emoji":
        from ddray.metrics.emoji_judge import EmojiJudge

        return EmojiJudge(source, device)
    from ddray.metrics.vision_transformer import Clip, Dinov2

    return (Dinov2 if name == "dinov2" else Clip)(source, device=device)

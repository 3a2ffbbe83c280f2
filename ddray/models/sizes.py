"""What the sizes of a model come to, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import image_side, resolve
from ddray.storage.checkpoint import read_config


@dataclass(frozen=True)
class ModelSizes:
    """A teacher or a student without weights.

    Attributes:
        config: sizes, and what its card says.
        network: on the meta device.
        stages: tokens of each.
        gigabytes: of float32 weights, the tokenizer's included.
        pixels: bytes of an image without compression.
        token_bytes: of one token.
        jumps: that it was trained for, of a student.
        teacher: that it names, of a student.
    """

    config: Mapping[str, Any]
    network: nn.Module
    stages: tuple[int, ...]
    gigabytes: float
    pixels: int
    token_bytes: int
    jumps: int
    teacher: str | None


def model_sizes(model: str) -> ModelSizes:
    """Sizes of a model by its name or folder.

    Raises:
        DDRayError: for one that is not there, or whose sizes do not fit together.
    """
    where = resolve(model)
    config = where if isinstance(where, Mapping) else read_config(where)
    network, codec = empty_network(config, model), empty_tokenizer(config, model)
    modules = [part for part in (network, codec) if part is not None]
    numbers = sum(p.numel() for part in modules for p in part.parameters())
    channels = getattr(codec.config, "in_channels", 3) if codec is not None else 0
    return ModelSizes(
        config=config,
        network=network,
        stages=tuple(network.stages),
        gigabytes=4 * numbers / 1e9,
        pixels=channels * image_side(config, model) ** 2 if codec is not None else 0,
        token_bytes=2 if network.config.vocab_size <= 2**16 else 4,
        jumps=len(config.get("schedule") or (0,)),
        teacher=config.get("teacher"),
    )

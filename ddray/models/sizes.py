"""What the sizes of a model come to, from its config or its network on the meta device.

Shapes: B rows of a step, T condition tokens, L image tokens, V codebook size, C model width.
"""

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


def forward_flops(student: nn.Module) -> int:
    """Operations of a student's forward pass over one trajectory.

    What is no matrix product is left out, and causal attention counts as full.

    Args:
        student: network of a student, or of masked decoding.
    """
    condition, tokens = lengths_of(student)
    positions = condition + tokens
    products = sum(
        2 * module.weight.numel() * _times(name, condition, tokens)
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear)
    )
    return products + 4 * positions**2 * width_of(student) * len(blocks_of(student))


def _times(name: str, condition: int, tokens: int) -> int:
    """How often a linear layer is applied for a row."""
    if ".ada_lin" in name or name.startswith("shared_ada_lin"):
        return 1  # to the class
    if name.startswith("layerwise_n_d_embed"):
        return 0  # to two vectors, whatever the number of rows
    if name.startswith("cls_embedding"):
        return condition
    return condition + tokens if name.startswith(("layers", "blocks")) else tokens


def step_flops(student: nn.Module, batch_size: int) -> int:
    """Operations of a training step of B rows, for estimates: three forward passes'.

    What a run reports is counted, critics included (ddray.distillation.operations).
    """
    return 3 * forward_flops(student) * batch_size


def lengths_of(network: Any) -> tuple[int, int]:
    """T and L of a network."""
    return getattr(network.config, "cls_token_num", 1), sum(network.stages)


def width_of(network: Any) -> int:
    """C of a network."""
    sizes = network.config
    return int(sizes.embed_dim if hasattr(sizes, "embed_dim") else sizes.dim)


def vocabulary_of(network: Any) -> int:
    """V of a network."""
    return int(network.config.vocab_size)


def blocks_of(network: Any) -> nn.ModuleList:
    """Transformer blocks of a network."""
    blocks: nn.ModuleList = getattr(network, "layers", None) or network.blocks
    return blocks

"""Which text encoder turns captions into features: a bundled name, a folder, a name on the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.locations import BUNDLED, S3
from ddray.storage.checkpoint import read_config
from ddray.text.encoder import TextEncoder
from ddray.text.t5 import FLAN_T5_XL, T5TextEncoder, encoder_width, t5_config, t5_flops
from ddray.text.words import FAMILY, WordEncoder

BUNDLED_ENCODERS = {"emoji-words": "vectors of word pieces, for the names of emoji"}
"""What comes inside the package."""


def own_encoder(config: Mapping[str, Any]) -> str:
    """The encoder that a model was trained with, as its config says; else LlamaGen's."""
    return str(config.get("text_encoder") or FLAN_T5_XL)


def own_captions(config: Mapping[str, Any], *, held_out: bool = False) -> str | None:
    """The file of captions that a bundled model comes with; None for other models.

    Args:
        config: of the model.
        held_out: whether of those that its training saw none of, or of those that it saw.
    """
    encoder = own_encoder(config)
    if encoder not in BUNDLED_ENCODERS:
        return None
    return str(BUNDLED / encoder / ("held-out.txt" if held_out else "captions.txt"))


def _words(source: str) -> str | None:
    """Folder of a table of words; None where the source is something else."""
    if source in BUNDLED_ENCODERS:
        return str(BUNDLED / source)
    if not Path(source).is_dir() and not source.startswith(S3):
        return None
    try:
        family = read_config(source)["family"]
    except CheckpointError:  # the config of a T5 names no family
        return None
    return source if family == FAMILY else None


def load_text_encoder(
    source: str, *, length: int, device: str | torch.device = "cpu"
) -> TextEncoder:
    """Load an encoder.

    Args:
        source: bundled name, folder (path or URI) of a table of words, folder or Hub name of a T5.
        length: T, caption positions of the model that reads the features.
        device: where they shall be.

    Raises:
        ConfigError: for a T5 without the package transformers.
        CheckpointError: if it cannot be loaded.
    """
    if folder := _words(source):
        return WordEncoder.load(folder, length=length, device=device)
    return T5TextEncoder(source, length=length, device=device)


def features_width(source: str) -> int:
    """D of an encoder's features, from its config alone.

    Args:
        source: as of `load_text_encoder`.

    Raises:
        ConfigError: for a T5 without the package transformers.
        CheckpointError: if its config cannot be read.
    """
    folder = _words(source)
    return int(read_config(folder)["width"]) if folder else encoder_width(source)


def check_text_encoder(source: str, reader: str, needed: int) -> None:
    """Refuse an encoder that is not there, or whose features a model does not take.

    Args:
        source: as of `load_text_encoder`.
        reader: name of the model.
        needed: width of the features that it takes.

    Raises:
        ConfigError: for another width, or a T5 without the package transformers.
        CheckpointError: if its config cannot be read.
    """
    width = features_width(source)
    if width != needed:
        raise ConfigError(
            f"text_encoder={source!r} makes features of width {width}; {reader} takes {needed}"
        )


class CaptionCost(NamedTuple):
    """What a caption takes.

    Attributes:
        flops: of its encoding, a multiplication and an addition as two.
        numbers: of its features.
    """

    flops: int
    numbers: int


def caption_cost(source: str, positions: int) -> CaptionCost:
    """What an encoder takes for a caption; of a published T5 without a look at it.

    Args:
        source: as of `load_text_encoder`.
        positions: of the caption; a table of words computes nothing.

    Raises:
        ConfigError: for a T5 without the package transformers.
        CheckpointError: if its config cannot be read.
    """
    if _words(source):
        return CaptionCost(0, positions * features_width(source))
    config = t5_config(source)
    return CaptionCost(t5_flops(config, positions), positions * int(config["d_model"]))

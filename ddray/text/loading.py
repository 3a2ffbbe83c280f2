"""Which text encoder turns captions into features: a bundled name, a folder, a name on the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.locations import BUNDLED, S3
from ddray.storage.checkpoint import read_config
from ddray.text import averaging, words
from ddray.text.averaging import (
    AveragingEncoder,
    DeepAveraging,
    averaging_sizes,
    read_averaging,
)
from ddray.text.encoder import TextEncoder
from ddray.text.t5 import FLAN_T5_XL, T5TextEncoder, encoder_width, t5_config, t5_flops
from ddray.text.words import WordEncoder

BUNDLED_ENCODERS = {
    "emoji-words": "vectors of word pieces, for the names of emoji",
    "emoji-text": "what the names of emoji mean, from the vectors of their words",
}
"""What comes inside the package."""
EMOJI = "emoji"
"""What configs of models that were trained on the bundled emoji say of their images."""
_EMOJI_CAPTIONS = BUNDLED / "emoji-words"


def own_encoder(config: Mapping[str, Any]) -> str:
    """The encoder that a model was trained with, as its config says; else LlamaGen's."""
    return str(config.get("text_encoder") or FLAN_T5_XL)


def makes_emoji(config: Mapping[str, Any]) -> bool:
    """Whether a model was trained on the bundled emoji, or distilled from one that was."""
    return config.get("images") == EMOJI


def own_captions(config: Mapping[str, Any], *, held_out: bool = False) -> str | None:
    """The file of captions that a bundled model comes with; None for other models.

    Args:
        config: of the model.
        held_out: whether of those that its training saw none of, or of those that it saw.
    """
    if not makes_emoji(config):
        return None
    return str(_EMOJI_CAPTIONS / ("held-out.txt" if held_out else "captions.txt"))


class _Own(NamedTuple):
    """An encoder of ddray's own: its folder, and the config in it."""

    folder: str
    config: dict[str, Any]

    @property
    def is_averaging(self) -> bool:
        """Whether it is a network over words, or else the words themselves."""
        return bool(self.config["family"] == averaging.FAMILY)


def _find_own(source: str) -> _Own | None:
    """The encoder of ddray's own that a source names; None where it is something else."""
    if source in BUNDLED_ENCODERS:
        folder = str(BUNDLED / source)
        return _Own(folder, read_config(folder))
    if not Path(source).is_dir() and not source.startswith(S3):
        return None
    try:
        own = _Own(source, read_config(source))
        return own if own.config["family"] in (words.FAMILY, averaging.FAMILY) else None
    except CheckpointError:  # the config of a T5 names no family
        return None


def _words_folder(table: str) -> str:
    """Where the words lie that a network reads, of which its config has the name or the folder."""
    return str(BUNDLED / table) if table in BUNDLED_ENCODERS else table


def own_folders(source: str) -> list[str]:
    """Folders of an encoder of ddray's own, then of the words that it reads; none of a T5.

    Args:
        source: as of `load_text_encoder`.
    """
    own = _find_own(source)
    if own is None:
        return []
    table = own.config.get("words")
    return [own.folder, _words_folder(table)] if table else [own.folder]


def load_text_encoder(
    source: str, *, length: int, device: str | torch.device = "cpu"
) -> TextEncoder:
    """Load an encoder.

    Args:
        source: bundled name, folder (path or URI) that ddray wrote, folder or Hub name of a T5.
        length: T, caption positions of the model that reads the features.
        device: where they shall be.

    Raises:
        ConfigError: for a T5 without the package transformers.
        CheckpointError: if it cannot be loaded.
    """
    own = _find_own(source)
    if own is None:
        return T5TextEncoder(source, length=length, device=device)
    if own.is_averaging:
        network = read_averaging(own.folder).to(device)
        return AveragingEncoder(network, _words_below(network, device=device), length=length)
    return WordEncoder.load(own.folder, length=length, device=device)


def _words_below(network: DeepAveraging, *, device: str | torch.device = "cpu") -> WordEncoder:
    """The table of word vectors that a network reads.

    Raises:
        CheckpointError: if it is not there, or none of its width.
    """
    sizes = network.config
    table = _words_folder(sizes.words)
    found = WordEncoder.load(table, length=sizes.max_words, device=device)
    if found.width != sizes.word_width:
        raise CheckpointError(f"{table} has words of width {found.width}, not {sizes.word_width}")
    return found


def features_width(source: str) -> int:
    """D of an encoder's features, from its config alone.

    Args:
        source: as of `load_text_encoder`.

    Raises:
        ConfigError: for a T5 without the package transformers.
        CheckpointError: if its config cannot be read.
    """
    own = _find_own(source)
    return int(own.config["width"]) if own else encoder_width(source)


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
    if own := _find_own(source):
        flops = averaging_sizes(own.config, own.folder).flops if own.is_averaging else 0
        return CaptionCost(flops, positions * int(own.config["width"]))
    config = t5_config(source)
    return CaptionCost(t5_flops(config, positions), positions * int(config["d_model"]))

"""Captions to their summary: word vectors, their mean, and layers behind it.

The deep averaging network of Iyyer et al. ("Deep unordered composition rivals syntactic methods for
text classification", ACL 2015) on the vectors of a `WordEncoder`. What a caption means is worked
out here, once, where it costs microseconds; a small transformer that gets single words in front of
its tokens spends most of its training on that (docs/text-to-image.md). LlamaGen's caption positions
are all alike to attention, which sees their mean: so the summary stands at each of them.

Shapes: B captions, W words of a caption, F features of a word, H hidden width, T caption positions
of the model, D width of the summary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import CheckpointError, ConfigError, positive_integers
from ddray.storage.checkpoint import load_folder, load_into, save_folder
from ddray.text.words import WordEncoder

FAMILY = "averaging"


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Sizes of a deep averaging network.

    Attributes:
        words: the table below, a bundled name or a folder.
        max_words: W, words of a caption that are read.
        word_width: F.
        hidden: H.
        width: D.

    Raises:
        ConfigError: if a size is no positive integer.
    """

    words: str
    max_words: int
    word_width: int
    hidden: int
    width: int

    def __post_init__(self) -> None:
        positive_integers(self, "max_words", "word_width", "hidden", "width")

    @property
    def flops(self) -> int:
        """Of the longest caption, a multiplication and an addition as two."""
        behind = 4 * self.hidden + self.width
        return 2 * self.hidden * (self.max_words * self.word_width + behind)


class DeepAveraging(nn.Module):
    """A layer a word, their mean, a residual layer, and the summary.

    Args:
        config: sizes.
    """

    def __init__(self, config: AveragingConfig):
        super().__init__()
        self.config = config
        self.word = nn.Linear(config.word_width, config.hidden)
        self.mixing = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, 2 * config.hidden),
            nn.SiLU(),
            nn.Linear(2 * config.hidden, config.hidden),
        )
        self.summary = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, config.width),
            nn.LayerNorm(config.width, elementwise_affine=False),
        )

    def forward(self, words_BWF: Tensor, mask_BW: Tensor) -> Tensor:
        """Summaries [B, D] of word features; each has mean 0 and variance 1."""
        weight = mask_BW[..., None].to(words_BWF.dtype)
        mean_BH = (F.silu(self.word(words_BWF)) * weight).sum(1) / weight.sum(1)
        out: Tensor = self.summary(mean_BH + self.mixing(mean_BH))
        return out

    def save(self, folder: str | Path) -> None:
        """Write it as a folder of a text encoder, weights as float16."""
        config = {"family": FAMILY, **asdict(self.config)}
        save_folder(folder, config, model={k: x.half() for k, x in self.state_dict().items()})


def read_averaging(folder: str | Path) -> DeepAveraging:
    """The network of a folder that `DeepAveraging.save` wrote, in float32 on the CPU.

    Args:
        folder: path or URI.

    Raises:
        CheckpointError: if it is none, or damaged.
    """
    config, state, _ = load_folder(folder)
    network = DeepAveraging(averaging_sizes(config, folder))
    load_into(network, state, str(folder))
    return network


def averaging_sizes(config: Mapping[str, Any], folder: str | Path) -> AveragingConfig:
    """The sizes that a folder's config holds.

    Args:
        config: of the folder.
        folder: that messages name.

    Raises:
        CheckpointError: if it is another one's.
    """
    sizes = {name: value for name, value in config.items() if name != "family"}
    try:
        if config["family"] != FAMILY:
            raise ValueError(f"family={config['family']!r}")
        return AveragingConfig(**sizes)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no deep averaging network ({error})") from error


class AveragingEncoder:
    """A text encoder whose T positions are all valid, and alike.

    Args:
        network: on the device of the words' features.
        words: the table below.
        length: T, caption positions of the model that reads the features.
    """

    def __init__(self, network: DeepAveraging, words: WordEncoder, *, length: int):
        self._network, self._words, self._length = network.eval(), words, length

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Args:
            captions: at least one, none of them empty once cleaned.

        Returns:
            Features float32 [B, T, D] and mask int64 [B, T] of ones.

        Raises:
            ConfigError: for a bare string, no caption, an empty one, or one that is no text.
        """
        summary_BD = self._network(*self._words(captions))
        features_BTD = summary_BD[:, None].repeat(1, self._length, 1)
        return features_BTD, torch.ones_like(features_BTD[..., 0], dtype=torch.int64)

"""Captions to features by a table of word vectors: a text encoder of a few megabytes.

Beside `T5TextEncoder` and of the same form, so that a model of captions runs where no large encoder
does. A word's vector is the mean of its pieces', the longest that the table has; so a word that no
training caption had is near those that mean the same. Behind it stands where the word is in the
caption, as sines and cosines: two colours of one caption are told apart by nothing else.

Shapes: B captions, T positions, P pieces, W width of a word's vector, D = W + its position's.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ddray.errors import CheckpointError
from ddray.storage.checkpoint import load_folder, save_folder
from ddray.text.encoder import cleaned_captions

FAMILY = "words"
_PIECES = "pieces"
_VECTORS = "vectors"
_SEPARATOR = "\n"
_WORD = re.compile(r"[a-z0-9]+")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215f\u2189]")
_APOSTROPHE = re.compile("['\u2018\u2019\u02bb-\u02bf]")
_WITHIN_A_WORD = {"Mn", "Cf"}  # marks, and formats such as the soft hyphen


def words(caption: str) -> list[str]:
    """The words of a caption: runs of letters a to z and digits, other letters without their marks.

    Apostrophes, marks and signs of no width stand within a word; every other sign divides words,
    and so do letters of other scripts. A caption in another script has no words.
    """
    # Or "5½" would be 51 and 2.
    apart = _FRACTION.sub(r" \g<0>", caption.casefold())
    letters = _APOSTROPHE.sub("", unicodedata.normalize("NFKD", apart))
    return _WORD.findall("".join(map(_plain, letters)))


def _plain(sign: str) -> str:
    """A sign of ASCII as it is; of others what they leave between their neighbours."""
    if sign.isascii():
        return sign
    return "" if unicodedata.category(sign) in _WITHIN_A_WORD else " "


def positions(length: int, width: int) -> Tensor:
    """Where a word stands, float32 [length, width]: sines and cosines of waves of 2 to 32 words."""
    waves = 2.0 ** torch.linspace(1, 5, width // 2)
    angle = 2 * math.pi * torch.arange(length)[:, None] / waves
    return torch.cat((angle.sin(), angle.cos()), 1)


class WordEncoder:
    """A table of word pieces and their vectors.

    Args:
        pieces: P texts of letters a to z and digits; those that begin a word have a "_" before.
        vectors_PW: float [P, W].
        length: T, words of a caption; further ones are cut.
        position_width: D - W, even.
        device: of the features.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        vectors_PW: Tensor,
        *,
        length: int,
        position_width: int,
        device: str | torch.device = "cpu",
    ):
        self.length = length
        self.device = torch.device(device)
        self.vectors_PW = vectors_PW.float()
        self._number = {piece: number for number, piece in enumerate(pieces)}
        self._longest = max(map(len, pieces))
        self._position_TD = positions(length, position_width)
        self._of = lru_cache(maxsize=1 << 14)(self._vector)

    @property
    def width(self) -> int:
        """D."""
        return self.vectors_PW.shape[1] + self._position_TD.shape[1]

    @classmethod
    def load(
        cls, folder: str | Path, *, length: int, device: str | torch.device = "cpu"
    ) -> "WordEncoder":
        """Read a folder that `save` wrote.

        Args:
            folder: path or URI.
            length: words of a caption that are read.
            device: of the features.

        Raises:
            CheckpointError: if it is none, or damaged.
        """
        config, state, _ = load_folder(folder)
        try:
            if config["family"] != FAMILY:
                raise ValueError(f"family={config['family']!r}")
            pieces = bytes(state[_PIECES].tolist()).decode().split(_SEPARATOR)
            if len(pieces) != len(state[_VECTORS]):
                raise ValueError(f"{len(pieces)} pieces, but {len(state[_VECTORS])} vectors")
            width = int(config["position_width"])
            return cls(pieces, state[_VECTORS], length=length, position_width=width, device=device)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder} is no table of words ({error})") from error

    def save(self, folder: str | Path) -> None:
        """Write the table as a folder, vectors as float16."""
        blob = _SEPARATOR.join(self._number).encode()
        save_folder(
            folder,
            {
                "family": FAMILY,
                "width": self.width,
                "position_width": self._position_TD.shape[1],
            },
            model={
                _VECTORS: self.vectors_PW.half(),
                _PIECES: torch.frombuffer(bytearray(blob), dtype=torch.uint8),
            },
        )

    def _pieces(self, marked: str) -> list[int]:
        """The longest pieces from the left; a sign that none begins with is passed over."""
        found, begin = [], 0
        while begin < len(marked):
            for end in range(min(begin + self._longest, len(marked)), begin, -1):
                if (number := self._number.get(marked[begin:end])) is not None:
                    found.append(number)
                    break
            begin = end
        return found

    def _vector(self, word: str) -> Tensor:
        pieces = self._pieces(f"_{word}")
        if not pieces:
            return torch.zeros(self.vectors_PW.shape[1])
        return self.vectors_PW[pieces].mean(0)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Args:
            captions: at least one, none of them empty once cleaned.

        Returns:
            Features float32 [B, T, D], padded on the right and zero there, and mask int64 [B, T],
            1 = valid. A caption without any word has one position, of zeros but for where it is.

        Raises:
            ConfigError: for a bare string, no caption, an empty one, or one that is no text.
        """
        told = [words(caption)[: self.length] for caption in cleaned_captions(captions)]
        features_BTD = torch.zeros(len(told), self.length, self.width)
        mask_BT = torch.zeros(len(told), self.length, dtype=torch.int64)
        width = self.vectors_PW.shape[1]
        for row, caption in enumerate(told):
            count = max(1, len(caption))
            mask_BT[row, :count] = 1
            features_BTD[row, :count, width:] = self._position_TD[:count]
            for place, word in enumerate(caption):
                features_BTD[row, place, :width] = self._of(word)
        return features_BTD.to(self.device), mask_BT.to(self.device)

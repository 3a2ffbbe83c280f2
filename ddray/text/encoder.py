"""The form of a text encoder: captions in, features of their positions out.

Features that were computed elsewhere are as good: no model asks where they come from.

Shapes: B captions, T positions, D feature width.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddray.errors import ConfigError
from ddray.storage.caption_file import clean_caption, no_text


class TextEncoder(Protocol):
    """What turns captions into the condition that `Teacher` and `Student` take."""

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [B, T, D], padded on the right, and mask int64 [B, T], 1 = valid."""


class TimedEncoder:
    """A text encoder that knows how long it has worked.

    Attributes:
        seconds: of all calls, each until its features are there.

    Args:
        encode: the encoder.
    """

    def __init__(self, encode: TextEncoder):
        self._encode = encode
        self.seconds = 0.0

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the encoder makes of them, as it makes it."""
        begin = time.perf_counter()
        features, mask = self._encode(captions)
        if features.is_cuda:  # which has only been told so far
            torch.cuda.synchronize(features.device)
        self.seconds += time.perf_counter() - begin
        return features, mask


def cleaned_captions(captions: Sequence[str]) -> list[str]:
    """Captions as an encoder reads them.

    Raises:
        ConfigError: for a bare string, no caption, an empty one, or one that is no text.
    """
    if isinstance(captions, str) or not captions:
        raise ConfigError(f"captions must be a list of at least one string, got {captions!r}")
    cleaned = [clean_caption(caption) for caption in captions]
    for number, reason in enumerate(map(no_text, cleaned)):
        if reason:
            raise ConfigError(f"caption {number} {reason}")
    if not all(cleaned):
        raise ConfigError(f"caption {cleaned.index('')} is empty")
    return cleaned

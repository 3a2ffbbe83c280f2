"""The bundled judge of emoji: embeddings of small pictures and of their names, in one space.

Trained on pictures and names that the held-out ones are not among (jobs/train_emoji_teacher.py), as
CLIP is (Radford et al., arXiv 2103.00020). It is small and knows nothing else.

Shapes: N pictures or captions, T words, D features of an embedding, W of a word.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.metrics.network import POOL, FeatureNetwork
from ddray.metrics.pixels import RESIZES
from ddray.storage.checkpoint import fingerprint, load_folder, load_into
from ddray.text.loading import load_text_encoder

SIDE, EMBEDDING = 32, 64
MAX_WORDS = 16
_CHANNELS = (32, 64, 96, 128)
_AT_ONCE = 256


class PictureTower(nn.Module):
    """Four convolutions with stride, on pictures of 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *_CHANNELS[:-1]), _CHANNELS, strict=True):
            stride = 1 if narrow == 3 else 2
            layers += [nn.Conv2d(narrow, wide, 3, stride, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(_CHANNELS[-1] * (SIDE // 8) ** 2, EMBEDDING)

    def forward(self, pictures: Tensor) -> Tensor:
        """Of float [N, 3, 32, 32] in [-1, 1], embeddings [N, D] of length 1."""
        return F.normalize(self.project(self.layers(pictures).flatten(1)), dim=-1)


class CaptionTower(nn.Module):
    """A layer for each word, the mean of them, and another layer."""

    def __init__(self, word_width: int):
        super().__init__()
        self.word = nn.Linear(word_width, 256)
        self.project = nn.Sequential(nn.LayerNorm(256), nn.SiLU(), nn.Linear(256, EMBEDDING))

    def forward(self, features_NTW: Tensor, mask_NT: Tensor) -> Tensor:
        """Of what a text encoder gives, embeddings [N, D] of length 1."""
        weight = mask_NT[..., None].to(features_NTW.dtype)
        words = F.silu(self.word(features_NTW)) * weight
        return F.normalize(self.project(words.sum(1) / weight.sum(1)), dim=-1)


class EmojiTowers(nn.Module):
    """Both towers.

    Args:
        word_width: features of a word.
    """

    def __init__(self, word_width: int):
        super().__init__()
        self.pictures, self.captions = PictureTower(), CaptionTower(word_width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))


class EmojiJudge(FeatureNetwork):
    """Embeddings of pictures, resized to 32 pixels, and of captions.

    Args:
        folder: model folder of the judge.
        device: where it runs.

    Raises:
        CheckpointError: if it is another, or damaged.
    """

    name = "emoji"
    layers = {POOL: EMBEDDING}

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.card, state, _ = load_folder(folder)
        self._encode = load_text_encoder(
            str(self.card["text_encoder"]), length=MAX_WORDS, device=device
        )
        towers = EmojiTowers(int(self.card["word_width"]))
        load_into(towers, state, str(folder))
        super().__init__(towers, fingerprint(towers), device)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        towers: EmojiTowers = self.module  # type: ignore[assignment]
        shown = pixels if pixels.shape[-2:] == (SIDE, SIDE) else RESIZES["bicubic"](pixels, SIDE)
        return {POOL: towers.pictures(shown / 127.5 - 1)}

    @torch.no_grad()
    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, float32 [N, D]."""
        towers: EmojiTowers = self.module  # type: ignore[assignment]
        parts = (captions[k : k + _AT_ONCE] for k in range(0, len(captions), _AT_ONCE))
        return torch.cat([towers.captions(*self._encode(part)) for part in parts])

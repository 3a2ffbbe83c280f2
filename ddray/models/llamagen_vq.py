"""The LlamaGen VQ tokenizer: a convolutional autoencoder with a codebook between its halves.

Sun et al. (arXiv 2406.06525). Parameter names are those of the official checkpoints:
`encoder.conv_blocks.0` is the highest resolution, `decoder.conv_blocks.0` the lowest.

Shapes: B batch, L tokens, V codebook size, E code width, P cells along a side.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import positive_integers
from ddray.models.autoencoder import (
    AutoencoderSizes,
    Decoder,
    Encoder,
    PartNames,
    nearest_codes,
)

_NAMES = PartNames(
    encoder_levels="conv_blocks",
    decoder_levels="conv_blocks",
    blocks="res",
    middle=("0", "1", "2"),
    decoder_from_lowest=True,
    fused_attention=False,
)


@dataclass(frozen=True, kw_only=True)
class LlamaGenVQConfig(AutoencoderSizes):
    """Sizes of the tokenizer, under the upstream field names; those of the halves are inherited.

    Attributes:
        codebook_size: number of codes V.
        codebook_embed_dim: code width E.
        codebook_l2_norm: whether codes and latents lie on the unit sphere.
    """

    z_channels: int = 256
    ch: int = 128
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integers(self, "codebook_size", "codebook_embed_dim")

    @property
    def num_codes(self) -> int:
        """Codebook size V."""
        return self.codebook_size

    @property
    def code_width(self) -> int:
        """Code width E."""
        return self.codebook_embed_dim


class Codebook(nn.Module):
    """The stored codes; `codebook_used` is a statistic in official files, unused at inference."""

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))


class LlamaGenVQ(nn.Module):
    """Images to tokens and codes to images.

    Args:
        config: sizes.
    """

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, _NAMES)
        self.decoder = Decoder(config, _NAMES)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def _to_sphere(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.codebook_l2_norm else x

    @property
    def codebook(self) -> Tensor:
        """Codes [V, E] as the models use them: on the unit sphere with `codebook_l2_norm`."""
        return self._to_sphere(self.quantize.embedding.weight)

    def latents(self, images: Tensor) -> Tensor:
        """Latents [B, L, E] of images in [-1, 1], in raster order, on the sphere if codes are."""
        latent = self.quant_conv(self.encoder(images))
        return self._to_sphere(latent.flatten(2).transpose(1, 2))

    def nearest(self, codes_BLE: Tensor) -> Tensor:
        """Tokens of the nearest codes by squared distance, int64 [B, L]; the first one on ties."""
        return nearest_codes(codes_BLE, self.codebook)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images in [-1, 1], int64 [B, L]."""
        return self.nearest(self.latents(images))

    def decoder_input(self, codes_BLE: Tensor) -> Tensor:
        """Codes in raster order as the grid that is decoded, [B, E, P, P]."""
        grid = round(codes_BLE.shape[1] ** 0.5)
        return codes_BLE.transpose(1, 2).unflatten(-1, (grid, grid))

    def decode(self, codes_BLE: Tensor) -> Tensor:
        """Images, about [-1, 1] and not clamped, of codes in raster order, used as they are."""
        out: Tensor = self.decoder(self.post_quant_conv(self.decoder_input(codes_BLE)))
        return out

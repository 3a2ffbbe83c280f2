"""The VAR tokenizer: an autoencoder whose latent is a sum of codes over ever finer scales.

Tian et al., "Visual autoregressive modeling" (arXiv 2404.02905). Scale k holds p_k x p_k codes z_k;
the latent is sum_k phi_k(up(z_k)), where up is bicubic to the last scale's grid and phi_k mixes its
input with a 3x3 convolution of it. Parameter names are those of the official checkpoints: the
levels of encoder and decoder count from the highest resolution.

Shapes: B batch, L tokens of all scales, l tokens of one scale, V codebook size, E code width, K
scales, P cells along a side of the last scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError, positive_integers
from ddray.method.flow import full_float32
from ddray.models.autoencoder import (
    AutoencoderSizes,
    Decoder,
    Encoder,
    PartNames,
    nearest_codes,
)

_NAMES = PartNames(
    encoder_levels="down",
    decoder_levels="up",
    blocks="block",
    middle=("block_1", "attn_1", "block_2"),
    decoder_from_lowest=False,
    fused_attention=True,
)

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True, kw_only=True)
class VARVQConfig(AutoencoderSizes):
    """Sizes of the tokenizer, under the upstream field names; those of the halves are inherited.

    Attributes:
        vocab_size: number of codes V; the code width E is z_channels.
        share_quant_resi: number of phi convolutions that the scales share, at least 2.
        quant_resi: share r of the convolution in phi(z) = (1 - r) z + r conv(z).
        using_znorm: whether the nearest code is searched by angle; codes are used as stored.
        patch_nums: cells along a side, scale by scale.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    z_channels: int = 32
    ch: int = 160
    vocab_size: int = 4096
    share_quant_resi: int = 4
    quant_resi: float = 0.5
    using_znorm: bool = False
    patch_nums: tuple[int, ...] = PATCH_NUMS_256

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integers(self, "vocab_size", "share_quant_resi")
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        if self.share_quant_resi < 2:
            raise ConfigError(
                f"share_quant_resi={self.share_quant_resi} must be at least 2; official "
                "tokenizers have 4"
            )
        if not 0 <= self.quant_resi <= 1:
            raise ConfigError(f"quant_resi={self.quant_resi} must lie in [0, 1]")

    @property
    def num_codes(self) -> int:
        """Codebook size V."""
        return self.vocab_size

    @property
    def code_width(self) -> int:
        """Code width E."""
        return self.z_channels


def check_patch_nums(patch_nums: tuple[int, ...]) -> tuple[int, ...]:
    """The scales as a tuple.

    Raises:
        ConfigError: unless they are positive integers that increase.
    """
    scales = tuple(patch_nums)
    whole = all(isinstance(p, int) and p > 0 for p in scales)
    if not scales or not whole or list(scales) != sorted(set(scales)):
        raise ConfigError(f"patch_nums={[*scales]} must be positive integers that increase")
    return scales


def phi_of_scale(num_scales: int, num_phis: int) -> list[int]:
    """Which shared phi serves each scale: the tick nearest to k / (K - 1), the first on ties.

    Ten scales have two exact ties, which float64 rounding breaks as it did in training: float64 is
    part of the definition.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return [int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1)))) for k in range(num_scales)]


class SharedPhis(nn.Module):
    """The 3x3 convolutions that smooth upsampled codes."""

    def __init__(self, config: VARVQConfig):
        super().__init__()
        width = config.z_channels
        self.qresi_ls = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(config.share_quant_resi)
        )
        self._share = config.quant_resi
        self._phi_of_scale = phi_of_scale(len(config.patch_nums), config.share_quant_resi)

    def forward(self, x_BEPP: Tensor, scale: int) -> Tensor:
        """Apply the phi of a scale over the whole grid."""
        # In float32: the tokens of the next scales follow from its digits.
        with full_float32(x_BEPP.device):
            convolved = self.qresi_ls[self._phi_of_scale[scale]](x_BEPP)
            return torch.lerp(x_BEPP, convolved, self._share)


class MultiScaleQuantizer(nn.Module):
    """Codes, and how those of all scales add up to one latent.

    `ema_vocab_hit_SV` is a statistic in official files, unused at inference.
    """

    def __init__(self, config: VARVQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = SharedPhis(config)
        hits = torch.zeros(len(config.patch_nums), config.vocab_size)
        self.register_buffer("ema_vocab_hit_SV", hits)

    @property
    def codebook(self) -> Tensor:
        """Codes [V, E], as stored."""
        return self.embedding.weight

    def nearest(self, x: Tensor) -> Tensor:
        """Ids of the nearest codes of [..., E]."""
        if self.config.using_znorm:
            return nearest_codes(F.normalize(x, dim=-1), F.normalize(self.codebook, dim=-1))
        return nearest_codes(x, self.codebook)

    def contribution(self, codes_BlE: Tensor, scale: int) -> Tensor:
        """What the codes of one scale add to the latent, phi_k(up(z_k)), [B, E, P, P]."""
        side, full = self.config.patch_nums[scale], self.config.patch_nums[-1]
        cells = codes_BlE.transpose(1, 2).unflatten(-1, (side, side))
        if side != full:
            cells = F.interpolate(cells, size=(full, full), mode="bicubic")
        out: Tensor = self.quant_resi(cells, scale)
        return out

    def seen_by(self, latent_BEPP: Tensor, scale: int) -> Tensor:
        """The latent so far at the resolution of a scale: that scale's input, [B, l, E]."""
        side = self.config.patch_nums[scale]
        if side != self.config.patch_nums[-1]:
            latent_BEPP = F.interpolate(latent_BEPP, size=(side, side), mode="area")
        return latent_BEPP.flatten(2).transpose(1, 2)

    def latents(self, codes_BLE: Tensor) -> Iterator[Tensor]:
        """The latent after each scale, [B, E, P, P]; the last one is the image's."""
        parts = codes_BLE.split([p * p for p in self.config.patch_nums], 1)
        contributions = (self.contribution(part, scale) for scale, part in enumerate(parts))
        return accumulate(contributions, torch.add)

    def inputs(self, codes_BLE: Tensor) -> Tensor:
        """What a transformer reads for all scales but the first, [B, L - l, E]."""
        later = range(1, len(self.config.patch_nums))
        seen = [self.seen_by(x, k) for k, x in zip(later, self.latents(codes_BLE), strict=False)]
        return torch.cat([codes_BLE[:, :0], *seen], 1)

    def encode(self, latent_BEPP: Tensor) -> Tensor:
        """Tokens of a latent, int64 [B, L]: each scale takes the nearest codes of what is left."""
        rest, tokens = latent_BEPP, []
        for scale in range(len(self.config.patch_nums)):
            ids = self.nearest(self.seen_by(rest, scale))
            rest = rest - self.contribution(self.codebook[ids], scale)
            tokens.append(ids)
        return torch.cat(tokens, 1)


class VARVQ(nn.Module):
    """Images to tokens of all scales and codes to images.

    Args:
        config: sizes.
    """

    def __init__(self, config: VARVQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, _NAMES)
        self.decoder = Decoder(config, _NAMES)
        self.quantize = MultiScaleQuantizer(config)
        width = config.z_channels
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)

    @property
    def codebook(self) -> Tensor:
        """Codes [V, E], as stored."""
        return self.quantize.codebook

    def nearest(self, codes_BLE: Tensor) -> Tensor:
        """Tokens of the nearest codes by squared distance, int64 [B, L]; the first one on ties."""
        return nearest_codes(codes_BLE, self.codebook)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images in [-1, 1], int64 [B, L]."""
        return self.quantize.encode(self.quant_conv(self.encoder(images)))

    def decoder_input(self, codes_BLE: Tensor) -> Tensor:
        """The sum over all scales that is decoded, [B, E, P, P]."""
        *_, latent = self.quantize.latents(codes_BLE)
        return latent

    def decode(self, codes_BLE: Tensor) -> Tensor:
        """Images clamped to [-1, 1], of the codes of all scales, used as they are."""
        out: Tensor = self.decoder(self.post_quant_conv(self.decoder_input(codes_BLE)))
        return out.clamp(-1, 1)

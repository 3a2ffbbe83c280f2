"""The LlamaGen VQ tokenizer: a convolutional autoencoder with a codebook between its halves.

Sun et al. (arXiv 2406.06525), after VQGAN (Esser et al., arXiv 2012.09841). Parameter names are
those of the official checkpoints: `encoder.conv_blocks.0` is the highest resolution,
`decoder.conv_blocks.0` the lowest. Imports ddray.errors.

Shapes: B batch, L tokens, V codebook size, E code width, X any channel count, H and W pixels or
cells.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError

_NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class LlamaGenVQConfig:
    """Sizes of the tokenizer, under the upstream field names.

    Attributes:
        codebook_size: number of codes V.
        codebook_embed_dim: code width E.
        z_channels: channels between the convolutions and the code space.
        ch: base channels, a multiple of 32 (the GroupNorm groups).
        ch_mult: channel multiplier of each resolution, highest first, halving from one to the next.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        codebook_l2_norm: whether codes and latents lie on the unit sphere.
        in_channels: image channels.

    Raises:
        ConfigError: if `ch` does not suit the norm.
    """

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    z_channels: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    codebook_l2_norm: bool = True
    in_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if self.ch % _NORM_GROUPS:
            raise ConfigError(f"ch={self.ch} must be a multiple of {_NORM_GROUPS} (GroupNorm)")

    @property
    def patch(self) -> int:
        """Pixels along one side of the square a token stands for."""
        return int(2 ** (len(self.ch_mult) - 1))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NORM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions, added to the input."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """Apply the block; the number of channels may change."""
        h = self.conv1(F.silu(self.norm1(x_BXHW)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = self.nin_shortcut(x_BXHW) if hasattr(self, "nin_shortcut") else x_BXHW
        out: Tensor = shortcut + h
        return out


class SpatialAttention(nn.Module):
    """Single-head attention over all cells, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """Attend from every cell to every cell."""
        normed = self.norm(x_BXHW)
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        out: Tensor = x_BXHW + self.proj_out(mixed.unflatten(-1, x_BXHW.shape[-2:]))
        return out


class Downsample(nn.Module):
    """Halve the resolution; the padding lies on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """[B, X, H, W] to [B, X, H / 2, W / 2]."""
        out: Tensor = self.conv(F.pad(x_BXHW, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the resolution by repetition, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """[B, X, H, W] to [B, X, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x_BXHW, scale_factor=2.0, mode="nearest"))
        return out


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        (
            ResidualBlock(channels, channels),
            SpatialAttention(channels),
            ResidualBlock(channels, channels),
        )
    )


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, then a resampling."""

    def __init__(
        self, channels_in: int, channels: int, blocks: int, attend: bool, resample: str | None
    ):
        super().__init__()
        widths = [channels_in, *[channels] * blocks]
        self.res = nn.ModuleList(
            ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.attn = nn.ModuleList(SpatialAttention(channels) for _ in range(blocks * attend))
        if resample == "down":
            self.downsample = Downsample(channels)
        elif resample == "up":
            self.upsample = Upsample(channels)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """Apply the level."""
        for i, block in enumerate(self.res):
            x_BXHW = block(x_BXHW)
            if len(self.attn):
                x_BXHW = self.attn[i](x_BXHW)
        if hasattr(self, "downsample"):
            return self.downsample(x_BXHW)
        return self.upsample(x_BXHW) if hasattr(self, "upsample") else x_BXHW


class Encoder(nn.Module):
    """Image to latent grid."""

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)] if i else config.ch,
                width,
                config.num_res_blocks,
                attend=i == last,
                resample=None if i == last else "down",
            )
            for i, width in enumerate(widths)
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, image_BXHW: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, z_channels, H / patch, W / patch]."""
        h = self.conv_in(image_BXHW)
        for module in (*self.conv_blocks, *self.mid):
            h = module(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Decoder(nn.Module):
    """Latent grid to image."""

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.num_res_blocks + 1,
                attend=i == 0,
                resample=None if i == last else "up",
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, latent_BXHW: Tensor) -> Tensor:
        """[B, z_channels, H / patch, W / patch] to [B, in_channels, H, W], not clamped."""
        h = self.conv_in(latent_BXHW)
        for module in (*self.mid, *self.conv_blocks):
            h = module(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


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
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
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
        codebook = self.codebook.to(codes_BLE.dtype)
        # |c|^2 - 2 x.c differs from the squared distance by |x|^2, which the argmin does not see.
        score = torch.addmm(
            codebook.square().sum(-1), codes_BLE.flatten(0, -2), codebook.T, alpha=-2.0
        )
        return score.argmin(-1).unflatten(0, codes_BLE.shape[:-1])

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images in [-1, 1], int64 [B, L]."""
        return self.nearest(self.latents(images))

    def decode(self, codes_BLE: Tensor) -> Tensor:
        """Images, about [-1, 1] and not clamped, of codes in raster order, used as they are."""
        grid = round(codes_BLE.shape[1] ** 0.5)
        cells = codes_BLE.transpose(1, 2).unflatten(-1, (grid, grid))
        out: Tensor = self.decoder(self.post_quant_conv(cells))
        return out

"""The convolutional halves of both families' tokenizers, and the search for the nearest code.

The recipe is VQGAN's (Esser et al., arXiv 2012.09841). The families differ in how they name the
parts, so every class takes the names that the official checkpoints use.

Shapes: B batch, N rows, V codebook size, E code width, X any channel count, H and W pixels or
cells.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError, positive_integers
from ddray.models.linear import linear

_NORM_GROUPS = 32

# On a CPU the levels above the lowest take as many images at once as keep an activation at full
# resolution within this, and at least one: larger passes leave the caches, and three such
# activations are all the memory that decoding needs.
_PASS_BYTES = 2**24

# Rows of a nearest-code search are compared in blocks of at most this many distances.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Sizes of encoder and decoder, under the upstream field names.

    Attributes:
        z_channels: channels between the convolutions and the code space.
        ch: base channels, a multiple of 32 (the GroupNorm groups).
        ch_mult: channel multiplier of each resolution, highest first, halving from one to the next.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        in_channels: image channels.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    z_channels: int
    ch: int
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    in_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        positive_integers(self, "z_channels", "ch", "num_res_blocks", "in_channels")
        if not self.ch_mult or not all(isinstance(m, int) and m > 0 for m in self.ch_mult):
            raise ConfigError(f"ch_mult={[*self.ch_mult]} must hold positive integers")
        if self.ch % _NORM_GROUPS:
            raise ConfigError(f"ch={self.ch} must be a multiple of {_NORM_GROUPS} (GroupNorm)")

    @property
    def patch(self) -> int:
        """Pixels along one side of the square a cell stands for."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class PartNames:
    """What a family calls the parts, and in which order it counts them.

    Attributes:
        encoder_levels: the encoder's list of levels, from the highest resolution.
        decoder_levels: the decoder's list of levels.
        blocks: residual blocks of a level.
        middle: the middle's block, attention and block.
        decoder_from_lowest: whether the decoder's level 0 has the lowest resolution (the order in
            which it runs) or the highest.
        fused_attention: whether queries, keys and values come from one convolution.
    """

    encoder_levels: str
    decoder_levels: str
    blocks: str
    middle: tuple[str, str, str]
    decoder_from_lowest: bool
    fused_attention: bool


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NORM_GROUPS, channels, eps=1e-6)


def _normalised_silu(norm: nn.GroupNorm, x_BXHW: Tensor) -> Tensor:
    return F.silu(norm(x_BXHW), inplace=not torch.is_grad_enabled())


def _pointwise(conv: nn.Conv2d, x_BXHW: Tensor) -> Tensor:
    """A 1x1 convolution; on a CPU as the matrix product that it is there, channels being last."""
    if x_BXHW.device.type != "cpu":
        out: Tensor = conv(x_BXHW)
        return out
    return linear(x_BXHW.movedim(1, 3), conv.weight.flatten(1), conv.bias).movedim(3, 1)


def _as_the_device_likes(x_BXHW: Tensor) -> Tensor:
    """Channels last on a CPU: its convolutions would otherwise reorder input and output each."""
    on_cpu = x_BXHW.device.type == "cpu"
    return x_BXHW.contiguous(memory_format=torch.channels_last) if on_cpu else x_BXHW


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
        h: Tensor = self.conv1(_normalised_silu(self.norm1, x_BXHW))
        h = self.conv2(_normalised_silu(self.norm2, h))
        if hasattr(self, "nin_shortcut"):
            x_BXHW = _pointwise(self.nin_shortcut, x_BXHW)
        # Under autocast the two have different dtypes, and the sum has the wider one.
        plain = torch.is_grad_enabled() or h.dtype != x_BXHW.dtype
        return x_BXHW + h if plain else h.add_(x_BXHW)


class SpatialAttention(nn.Module):
    """Single-head attention over all cells, added to the input."""

    def __init__(self, channels: int, fused: bool):
        super().__init__()
        self.norm = _norm(channels)
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """Attend from every cell to every cell."""
        normed = self.norm(x_BXHW)
        if hasattr(self, "qkv"):
            parts = _pointwise(self.qkv, normed).chunk(3, dim=1)
        else:
            parts = tuple(_pointwise(conv, normed) for conv in (self.q, self.k, self.v))
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x_BXHW + _pointwise(self.proj_out, mixed.unflatten(-1, x_BXHW.shape[-2:]))


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
        if x_BXHW.device.type != "cpu":
            out: Tensor = self.conv(F.interpolate(x_BXHW, scale_factor=2.0, mode="nearest"))
            return out
        # Where pixels are repeated, nine neighbours are four values: a transposed convolution by
        # sums over 2x2 windows of the weights needs 4 products a pixel, not 9. cuDNN may sum a
        # transposed one in an order that changes from run to run, so a GPU keeps to the plain way.
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)
        weight = weight.contiguous(memory_format=torch.channels_last)
        weight = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x_BXHW, weight, self.conv.bias, stride=2, padding=1)


def _middle(channels: int, names: PartNames) -> nn.Sequential:
    parts = (
        ResidualBlock(channels, channels),
        SpatialAttention(channels, names.fused_attention),
        ResidualBlock(channels, channels),
    )
    return nn.Sequential(OrderedDict(zip(names.middle, parts, strict=True)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, then a resampling."""

    def __init__(
        self,
        widths: list[int],
        names: PartNames,
        *,
        attend: bool,
        resample: Downsample | Upsample | None,
    ):
        super().__init__()
        self._blocks = names.blocks
        self.add_module(
            names.blocks, nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        )
        self.attn = nn.ModuleList(
            SpatialAttention(width, names.fused_attention) for width in widths[1:] if attend
        )
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif resample is not None:
            self.upsample = resample

    def forward(self, x_BXHW: Tensor) -> Tensor:
        """Apply the level."""
        for i, block in enumerate(self.get_submodule(self._blocks).children()):
            x_BXHW = block(x_BXHW)
            if len(self.attn):
                x_BXHW = self.attn[i](x_BXHW)
        if hasattr(self, "downsample"):
            return self.downsample(x_BXHW)
        return self.upsample(x_BXHW) if hasattr(self, "upsample") else x_BXHW


class Encoder(nn.Module):
    """Image to latent grid."""

    def __init__(self, sizes: AutoencoderSizes, names: PartNames):
        super().__init__()
        widths = [sizes.ch, *(sizes.ch * m for m in sizes.ch_mult)]
        last = len(widths) - 2
        self._levels = names.encoder_levels
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        levels = nn.ModuleList(
            Level(
                [before, *[width] * sizes.num_res_blocks],
                names,
                attend=i == last,
                resample=None if i == last else Downsample(width),
            )
            for i, (before, width) in enumerate(pairwise(widths))
        )
        self.add_module(names.encoder_levels, levels)
        self.mid = _middle(widths[-1], names)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def features(self, image_BXHW: Tensor) -> Iterator[Tensor]:
        """What is known of images after each level, and last after the middle, [B, X, H, W]."""
        h = self.conv_in(_as_the_device_likes(image_BXHW))
        for level in self.get_submodule(self._levels).children():
            h = level(h)
            yield h
        yield self.mid(h)

    def forward(self, image_BXHW: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, z_channels, H / patch, W / patch]."""
        # One after the other: no more of them than one is in memory.
        for deeper in self.features(image_BXHW):
            h = deeper
        out: Tensor = self.conv_out(_normalised_silu(self.norm_out, h))
        return out


class Decoder(nn.Module):
    """Latent grid to image."""

    def __init__(self, sizes: AutoencoderSizes, names: PartNames):
        super().__init__()
        widths = [sizes.ch * m for m in reversed(sizes.ch_mult)]
        widths.insert(0, widths[0])
        last = len(widths) - 2
        self._levels, self._from_lowest = names.decoder_levels, names.decoder_from_lowest
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], names)
        levels = [
            Level(
                [before, *[width] * (sizes.num_res_blocks + 1)],
                names,
                attend=i == 0,
                resample=None if i == last else Upsample(width),
            )
            for i, (before, width) in enumerate(pairwise(widths))
        ]
        self.add_module(names.decoder_levels, nn.ModuleList(self._in_running_order(levels)))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.in_channels, 3, padding=1)
        self._higher_dtype: torch.dtype | None = None
        self._largest = sizes.ch * sizes.ch_mult[0] * sizes.patch**2

    def _in_running_order(self, levels: Iterable[nn.Module]) -> list[nn.Module]:
        """The stored order from the running order, or back."""
        return [*levels] if self._from_lowest else [*levels][::-1]

    def _running_levels(self) -> list[nn.Module]:
        return self._in_running_order(self.get_submodule(self._levels).children())

    def forward(self, latent_BXHW: Tensor) -> Tensor:
        """[B, z_channels, H / patch, W / patch] to [B, in_channels, H, W], not clamped."""
        lowest, *_ = self._running_levels()
        h = lowest(self.mid(self.conv_in(_as_the_device_likes(latent_BXHW))))
        parts = [self._higher(part) for part in h.split(self._images_of_a_pass(latent_BXHW))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _higher(self, h_BXHW: Tensor) -> Tensor:
        """What is left to do above the lowest resolution."""
        if self._higher_dtype is not None:
            h_BXHW = h_BXHW.to(self._higher_dtype)
        _, *levels = self._running_levels()
        for level in levels:
            h_BXHW = level(h_BXHW)
        out: Tensor = self.conv_out(_normalised_silu(self.norm_out, h_BXHW))
        return out

    def _images_of_a_pass(self, latent_BXHW: Tensor) -> int:
        count, _, *cells = latent_BXHW.shape
        if latent_BXHW.device.type != "cpu" or torch.is_grad_enabled():
            return max(1, count)
        activation = self._largest * math.prod(cells) * self.conv_out.weight.itemsize
        # A power of two, as a renderer's passes are: those divide without a rest.
        return 1 << (max(1, _PASS_BYTES // activation).bit_length() - 1)

    def lowered(self, dtype: torch.dtype) -> "Decoder":
        """This decoder with all above the lowest resolution in another dtype; itself if in that.

        The lowest level and what comes before it stay as they are, and shared: a thirteenth of
        the work, and where rounding costs an image most.
        """
        if dtype == self.conv_out.weight.dtype:
            return self
        lowest, *_ = self._running_levels()
        shared = {id(part): part for part in (self.conv_in, self.mid, lowest)}
        lowered = copy.deepcopy(self, shared)
        _, *higher = lowered._running_levels()
        for part in (*higher, lowered.norm_out, lowered.conv_out):
            part.to(dtype)
        lowered._higher_dtype = dtype
        return lowered


def nearest_codes(x: Tensor, codebook_VE: Tensor) -> Tensor:
    """Ids of the codes at the least squared distance; the first one on ties.

    Args:
        x: float [..., E].
        codebook_VE: float [V, E].

    Returns:
        int64 [...].
    """
    codes_VE = codebook_VE.to(x.dtype)
    square_V = codes_VE.square().sum(-1)
    rows_NE = x.flatten(0, -2)
    # |c|^2 - 2 x.c differs from the squared distance by |x|^2, which the argmin does not see.
    # Blocks of rows keep the memory flat, however many rows there are.
    ids = [
        torch.addmm(square_V, part, codes_VE.T, alpha=-2.0).argmin(-1)
        for part in rows_NE.split(max(1, _BLOCK_ELEMENTS // len(codes_VE)))
    ]
    return torch.cat(ids).unflatten(0, x.shape[:-1])

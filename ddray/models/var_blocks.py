"""VAR's sizes and the parts it is made of: blocks modulated by the class, and its last norm.

Parameter names are those of the official checkpoints; the transformer itself is `ddray.models.var`.

Shapes: B batch, l tokens of this step, C model width, H heads, h head width.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError, positive_integers
from ddray.models.attention import KeyValueCache, attend
from ddray.models.linear import Linear, linear
from ddray.models.var_vq import (
    PATCH_NUMS_256,
    check_patch_nums,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a VAR transformer, under the upstream field names.

    Attributes:
        depth: number of blocks d.
        embed_dim: model width C; 0 = 64 d.
        num_heads: attention heads; 0 = d.
        mlp_ratio: width of the feed-forward layer over C.
        attn_l2_norm: whether queries and keys are normalised, with a learnt scale per head.
        shared_aln: whether all blocks share one modulation layer (d36).
        num_classes: number of classes; class id num_classes is the null class of guidance.
        patch_nums: cells along a side, scale by scale.
        vocab_size: codebook size V.
        codebook_dim: code width E.
        norm_eps: epsilon of LayerNorm.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    depth: int
    embed_dim: int = 0
    num_heads: int = 0
    mlp_ratio: float = 4.0
    attn_l2_norm: bool = True
    shared_aln: bool = False
    num_classes: int = 1000
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096
    codebook_dim: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
        object.__setattr__(self, "embed_dim", self.embed_dim or 64 * self.depth)
        object.__setattr__(self, "num_heads", self.num_heads or self.depth)
        if not isinstance(self.mlp_ratio, int | float) or self.mlp_ratio <= 0:
            raise ConfigError(f"mlp_ratio={self.mlp_ratio!r} must be a positive number")
        fields = ("depth", "embed_dim", "num_heads", "num_classes", "vocab_size", "codebook_dim")
        positive_integers(self, *fields)
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(p * p for p in self.patch_nums)


class Attention(nn.Module):
    """Multi-head attention; queries and values have biases, keys a stored zero."""

    zero_k_bias: Tensor

    def __init__(self, config: VARConfig):
        super().__init__()
        width, heads = config.embed_dim, config.num_heads
        self.num_heads = heads
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        # A learnt temperature replaces the usual one; without it upstream's is 1/4 of the usual.
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(width // heads)
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)

    def constants(self) -> tuple[Tensor, Tensor | None]:
        """What is the same at every step of a batch.

        Returns:
            Bias of queries, keys and values [3C]; and by what the normalised queries and keys are
            multiplied [2, 1, H, 1, 1], None where they are not normalised.
        """
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        if not hasattr(self, "scale_mul_1H11"):
            return bias, None
        sharpness = self.scale_mul_1H11.clamp_max(_MAX_LOG_SCALE).exp()
        return bias, torch.stack((sharpness, torch.ones_like(sharpness)))

    def forward(
        self,
        x_BlC: Tensor,
        mask: "Tensor | BlockMask | None",
        cache: KeyValueCache | None,
        constants: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Attend to the positions that the mask allows, and to everything in the cache."""
        bias, scales = self.constants() if constants is None else constants
        qkv = linear(x_BlC, self.mat_qkv.weight, bias)
        qkv_3BHlh = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_and_k, v = qkv_3BHlh[:2], qkv_3BHlh[2]
        if scales is not None:
            q_and_k = F.normalize(q_and_k, dim=-1).mul(scales).to(v.dtype)
        q, k = q_and_k.unbind()
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is None or isinstance(mask, Tensor):
            mixed = attend(q, k, v, mask, scale=self.scale)
        else:
            from torch.nn.attention.flex_attention import flex_attention  # with torch's compiler

            mixed = flex_attention(q, k, v, block_mask=mask, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers around a GELU (its tanh form)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_BlC: Tensor) -> Tensor:
        """Apply to every position."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BlC), approximate="tanh"))
        return out


def modulation_layer(width: int, times: int) -> nn.Sequential:
    """From a class embedding [B, C] to so many vectors of its width, [B, times C]."""
    return nn.Sequential(nn.SiLU(), Linear(width, times * width))


class Block(nn.Module):
    """Attention and feed-forward, each normalised, scaled, shifted and gated by the class."""

    def __init__(self, config: VARConfig):
        super().__init__()
        width = config.embed_dim
        self.norm_eps = config.norm_eps
        self.attn = Attention(config)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = modulation_layer(width, 6)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Two gates, factors and shifts, each [B, 1, C]; one pass serves all steps of a batch.

        Args:
            condition: as `VARTrunk.for_blocks` gives it.
        """
        if hasattr(self, "ada_gss"):
            six = self.ada_gss + condition
        else:
            six = self.ada_lin[1](condition)[:, None].unflatten(-1, (6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        return gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2

    def forward(
        self,
        x_BlC: Tensor,
        modulation: tuple[Tensor, ...],
        mask: "Tensor | BlockMask | None",
        cache: KeyValueCache | None = None,
        between: Tensor | None = None,
        constants: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """One block over [B, l, C].

        Args:
            x_BlC: the input.
            modulation: as the method of this name gives it.
            mask: added to the scores, or of tiles.
            cache: of earlier positions.
            between: is added between attention and feed-forward.
            constants: of the attention, where they are at hand.
        """
        gate1, gate2, factor1, factor2, shift1, shift2 = modulation
        normed = F.layer_norm(x_BlC, x_BlC.shape[-1:], eps=self.norm_eps)
        mixed = self.attn(torch.addcmul(shift1, normed, factor1), mask, cache, constants)
        x_BlC = torch.addcmul(x_BlC, gate1, mixed)
        if between is not None:
            x_BlC = x_BlC + between
        normed = F.layer_norm(x_BlC, x_BlC.shape[-1:], eps=self.norm_eps)
        return torch.addcmul(x_BlC, gate2, self.ffn(torch.addcmul(shift2, normed, factor2)))


class HeadNorm(nn.Module):
    """The norm in front of the logits, scaled and shifted by the class."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.norm_eps = config.norm_eps
        self.ada_lin = modulation_layer(config.embed_dim, 2)

    def modulation(self, condition_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and shift, [B, 1, C] each."""
        scale, shift = self.ada_lin(condition_BC)[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x_BlC: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Normalise [B, l, C]."""
        factor, shift = modulation
        normed = F.layer_norm(x_BlC, x_BlC.shape[-1:], eps=self.norm_eps)
        return torch.addcmul(shift, normed, factor)

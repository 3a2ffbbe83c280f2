"""The VAR transformer: one autoregressive step a scale, every block modulated by the class.

Tian et al., "Visual autoregressive modeling: scalable image generation via next-scale prediction"
(arXiv 2404.02905). Parameter names are those of the official checkpoints.

Shapes: B batch, L tokens of all levels, l tokens of this step, P tokens of a prefix, V codebook
size, E code width, C model width, H heads, h head width, K scales.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError, positive_integers
from ddray.method.guidance import top_p_filter_from_below
from ddray.models.kv_cache import KeyValueCache
from ddray.models.linear import Linear, linear
from ddray.models.var_vq import (
    PATCH_NUMS_256,
    MultiScaleQuantizer,
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
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
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


def _modulation_layer(width: int, times: int) -> nn.Sequential:
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
            self.ada_lin = _modulation_layer(width, 6)

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
        self.ada_lin = _modulation_layer(config.embed_dim, 2)

    def modulation(self, condition_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and shift, [B, 1, C] each."""
        scale, shift = self.ada_lin(condition_BC)[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x_BlC: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Normalise [B, l, C]."""
        factor, shift = modulation
        normed = F.layer_norm(x_BlC, x_BlC.shape[-1:], eps=self.norm_eps)
        return torch.addcmul(shift, normed, factor)


class VARTrunk(nn.Module):
    """What the teacher and its student share: embeddings, blocks, logits.

    Args:
        config: sizes.
        levels: tokens of each level; a level's positions share an embedding.
        sees_own_level: whether a position sees all of its level, or of that only itself.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor
    conditioning = "class"
    block: type[Block] = Block

    def __init__(self, config: VARConfig, levels: tuple[int, ...], *, sees_own_level: bool):
        super().__init__()
        width, length = config.embed_dim, sum(levels)
        self.config = config
        self.levels = levels
        self.stages = config.stages
        self._sees_own_level = sees_own_level
        self.word_embed = nn.Linear(config.codebook_dim, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, levels[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, width))
        self.lvl_embed = nn.Embedding(len(levels), width)
        if config.shared_aln:
            self.shared_ada_lin = _modulation_layer(width, 6)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config)
        self.head = Linear(width, config.vocab_size)
        for name, value in self._level_buffers().items():
            self.register_buffer(name, value.to(self.word_embed.weight.device))

    def _level_buffers(self) -> dict[str, Tensor]:
        # On the CPU: as meta tensors they would import half of torch's Python.
        cpu = torch.device("cpu")
        sizes = torch.tensor(self.levels, device=cpu)
        level = torch.arange(len(self.levels), device=cpu).repeat_interleave(sizes)[None]
        if self._sees_own_level:
            allowed = level <= level.T
        else:
            itself = torch.eye(level.shape[1], dtype=torch.bool, device=cpu)
            allowed = (level < level.T) | itself
        bias = torch.zeros(allowed.shape, device=cpu).masked_fill_(~allowed, -math.inf)
        return {"lvl_1L": level, "attn_bias_for_masking": bias[None, None]}

    def constants(self) -> dict[str, Tensor]:
        """State-dict entries that follow from the sizes, for files that lack them or differ."""
        biases = {
            f"blocks.{i}.attn.zero_k_bias": torch.zeros(self.config.embed_dim)
            for i in range(len(self.blocks))
        }
        return self._level_buffers() | biases

    def init_weights(self, gate: float = 1e-5, head: float = 0.02) -> None:
        """Truncated normal weights of deviation sqrt(1 / 3C), residual layers scaled by depth.

        Modulations start small and the gates smaller, so that a new network is close to linear.

        Args:
            gate: factor on the weights of the gates.
            head: factor on the weights of the logits.
        """
        std = math.sqrt(1 / (3 * self.config.embed_dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std)
        factors = {
            r"^head\.weight": head,
            r"^head_nm\.ada_lin\.1\.weight": 0.5,
            r"\.(attn\.proj|ffn\.fc2)\.weight": 1 / math.sqrt(2 * self.config.depth),
        }
        with torch.no_grad():
            for name, weight in self.named_parameters():
                for pattern, factor in factors.items():
                    if re.search(pattern, name):
                        weight.mul_(factor)
                if re.search(r"^(blocks\.\d+\.|shared_)ada_lin\.1\.weight", name):
                    weight[: 2 * self.config.embed_dim] *= gate
                    weight[2 * self.config.embed_dim :] *= 0.5

    def places(self) -> Tensor:
        """What is added to the input of every position: level and position, [1, L, C]."""
        out: Tensor = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        return out

    def for_blocks(self, condition_BC: Tensor) -> Tensor:
        """What `Block.modulation` takes: what is the same in all blocks is done once.

        Args:
            condition_BC: class embedding.

        Returns:
            It behind the SiLU [B, C], or the shared layer's output [B, 1, 6, C].
        """
        if not self.config.shared_aln:
            return F.silu(condition_BC)
        shared: Tensor = self.shared_ada_lin(condition_BC)[:, None].unflatten(-1, (6, -1))
        return shared

    def modulations(self, condition_BC: Tensor) -> list[tuple[Tensor, ...]]:
        """Gates, factors and shifts of every block."""
        condition = self.for_blocks(condition_BC)
        modulations: list[tuple[Tensor, ...]] = [
            block.modulation(condition)  # type: ignore[operator]
            for block in self.blocks
        ]
        return modulations

    def logits(self, x_BlC: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Head norm, modulated as it says, and output matrix; [B, l, V] in the network's dtype."""
        out: Tensor = self.head(self.head_nm(x_BlC, modulation))
        return out


class VAR(VARTrunk):
    """The autoregressive teacher: stage k is scale k, and its input the latent so far.

    Args:
        config: sizes.
    """

    top_p_filter = staticmethod(top_p_filter_from_below)
    no_guidance = 0.0

    def __init__(self, config: VARConfig):
        super().__init__(config, config.stages, sees_own_level=True)
        # Not a submodule: its weights belong to the tokenizer, and stay float32.
        self._quantizer: tuple[MultiScaleQuantizer, ...] = ()
        # From 0 at the first scale to 1 at the last, in float32 as upstream divides.
        last = np.float32(max(len(self.stages) - 1, 1))
        self._ramp = [float(np.float32(stage) / last) for stage in range(len(self.stages))]
        self._ramp_L1: Tensor | None = None

    def use_quantizer(self, quantizer: MultiScaleQuantizer) -> None:
        """Take the tokenizer's quantizer: it turns the tokens of a scale into the next input."""
        self._quantizer = (quantizer,)

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """The tokenizer's quantizer.

        Raises:
            ConfigError: if the model was loaded without a tokenizer.
        """
        if not self._quantizer:
            raise ConfigError(
                "a VAR reads sums of codes, so it needs its tokenizer; give tokenizer= to the "
                "loader"
            )
        return self._quantizer[0]

    def first_input(self, cond_B: Tensor) -> Tensor:
        """Input of the first scale, before `places`, [B, l, C]."""
        out: Tensor = self.class_emb(cond_B)[:, None] + self.pos_start
        return out

    def embed(self, seen_BlE: Tensor) -> Tensor:
        """Inputs of later scales, before `places`, from the latent so far."""
        out: Tensor = self.word_embed(seen_BlE.to(self.word_embed.weight.dtype))
        return out

    def forward(self, cond_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Teacher-forced logits; those of scale k see the tokens of the scales before k only.

        Args:
            cond_B: int64 class ids [B], the null class included.
            tokens_BL: int64 [B, L]; the last scale is not read.

        Returns:
            float32 [B, L, V].
        """
        known = self.quantizer.inputs(self.quantizer.codebook[tokens_BL])
        condition = self.class_emb(cond_B)
        x_BLC = torch.cat((self.first_input(cond_B), self.embed(known)), 1) + self.places()
        mask = self.attn_bias_for_masking.to(x_BLC.dtype)
        for block, modulation in zip(self.blocks, self.modulations(condition), strict=True):
            x_BLC = block(x_BLC, modulation, mask)
        return self.logits(x_BLC, self.head_nm.modulation(condition)).float()

    def null(self, cond_B: Tensor) -> Tensor:
        """The null class of guidance."""
        return torch.full_like(cond_B, self.config.num_classes)

    @staticmethod
    def guides(cfg: float | None) -> bool:
        """Whether a guidance number does anything: here 0 is the conditional model."""
        return cfg is not None and cfg != 0

    def guide(self, conditional: Tensor, null: Tensor, cfg: float, stage: int | None) -> Tensor:
        """(1 + t) conditional - t null, with t from 0 at the first scale to cfg at the last.

        Args:
            conditional: [B, l, V], of one stage, or [B, L, V].
            null: likewise.
            cfg: guidance at the last scale.
            stage: which one; None = the logits of all.
        """
        if stage is None:
            t_L1 = cfg * self._ramp_of_tokens(conditional.device)
            return conditional + t_L1.to(conditional.dtype) * (conditional - null)
        return conditional + cfg * self._ramp[stage] * (conditional - null)

    def _ramp_of_tokens(self, device: torch.device) -> Tensor:
        """How far the guidance of each token has risen, float32 [L, 1], made once for a device."""
        if self._ramp_L1 is None or self._ramp_L1.device != device:
            rows = [
                [r] for r, size in zip(self._ramp, self.stages, strict=True) for _ in range(size)
            ]
            with torch.inference_mode(False):
                self._ramp_L1 = torch.tensor(rows, device=device)
        return self._ramp_L1

    def decoder(
        self, cond_B: Tensor, prefix_BP: Tensor | None = None, *, unmasked_prefix: bool = False
    ) -> "VARDecoder":
        """Begin stage-by-stage decoding of a batch, behind tokens of the first stages if given."""
        return VARDecoder(self, cond_B, prefix_BP, unmasked_prefix)


class VARDecoder:
    """One batch on its way through the scales, with a static key-value cache.

    Args:
        model: the transformer.
        cond_B: int64 class ids [B].
        prefix_BP: int64 tokens of the first scales, or None; fewer rows than conditions repeat, as
            guidance needs it.
        unmasked_prefix: let the prefix and the first new scale's inputs see all of one another, as
            the code of the published 3- and 4-step students did. The default is the mask of
            training.
    """

    def __init__(self, model: VAR, cond_B: Tensor, prefix_BP: Tensor | None, unmasked_prefix: bool):
        self._model = model
        self._condition = model.class_emb(cond_B)
        self._modulations = model.modulations(self._condition)
        self._head_modulation = model.head_nm.modulation(self._condition)
        self._constants = [
            block.attn.constants()  # type: ignore[union-attr, operator]
            for block in model.blocks
        ]
        self._places = model.places()
        sizes = model.config
        heads = sizes.num_heads
        shape = (len(cond_B), heads, sum(model.stages), sizes.embed_dim // heads)
        self._caches = [KeyValueCache(shape, self._condition) for _ in model.blocks]
        self._latent: Tensor | None = None
        self._next_BlC = model.first_input(cond_B)
        self._stage, self._mask = 0, None
        if prefix_BP is None:
            return
        for tokens in self._scales_of(prefix_BP):
            inputs = self._next_BlC
            self.append(tokens)
            self._next_BlC = torch.cat((inputs, self._next_BlC), 1)
        if not unmasked_prefix:
            count = self._next_BlC.shape[1]
            self._mask = model.attn_bias_for_masking[..., :count, :count].to(self._next_BlC.dtype)

    def _scales_of(self, prefix_BP: Tensor) -> tuple[Tensor, ...]:
        sizes, left = [], prefix_BP.shape[1]
        for size in self._model.stages:
            if left <= 0:
                break
            sizes.append(size)
            left -= size
        return prefix_BP.split(sizes, 1)

    def logits(self) -> Tensor:
        """Logits of the next stage, float32 [B, l, V]; `append` must come before the next call."""
        x_BlC, position = self._next_BlC, self._caches[0].length
        x_BlC = x_BlC + self._places[:, position : position + x_BlC.shape[1]]
        of_block = (self._model.blocks, self._modulations, self._caches, self._constants)
        for block, modulation, cache, constants in zip(*of_block, strict=True):
            x_BlC = block(x_BlC, modulation, self._mask, cache, constants=constants)
        self._mask = None
        asked = self._model.stages[self._stage]
        return self._model.logits(x_BlC[:, -asked:], self._head_modulation).float()

    def append(self, tokens_Bl: Tensor) -> None:
        """Give the tokens of the stage whose logits were read, int64 [B, l]."""
        quantizer, stage = self._model.quantizer, self._stage
        self._stage += 1
        if self._stage == len(self._model.stages):
            return
        added = quantizer.contribution(quantizer.codebook[tokens_Bl], stage)
        self._latent = added if self._latent is None else self._latent + added
        inputs = self._model.embed(quantizer.seen_by(self._latent, self._stage))
        self._next_BlC = inputs.repeat(len(self._condition) // len(inputs), 1, 1)

"""The VAR transformer: one autoregressive step a scale, every block modulated by the class.

Tian et al., "Visual autoregressive modeling: scalable image generation via next-scale prediction"
(arXiv 2404.02905). Parameter names are those of the official checkpoints.

Shapes: B batch, L tokens of all levels, l tokens of this step, P tokens of a prefix, V codebook
size, E code width, C model width, H heads, h head width, K scales.
"""

import math
import re
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.errors import ConfigError
from ddray.method.guidance import top_p_filter_from_below
from ddray.models.attention import KeyValueCache
from ddray.models.linear import Linear
from ddray.models.var_vq import (
    MultiScaleQuantizer,
)

if TYPE_CHECKING:
    pass
from ddray.models.var_blocks import Block, HeadNorm, VARConfig, modulation_layer


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
            self.shared_ada_lin = modulation_layer(width, 6)
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

    def logits(self, stages: int = 1) -> Tensor:
        """Logits of the next stages, float32 [B, l, V]; `append` must come before the next call.

        Each of several stages reads the latent of the scales that are known, as if the scales
        between added nothing, and sees the stages before it, as in training.
        """
        x_BlC, position = self._next_BlC, self._caches[0].length
        mask = self._mask
        if stages > 1:
            later = range(self._stage + 1, self._stage + stages)
            x_BlC = torch.cat((x_BlC, *map(self._inputs, later)), 1)
            end = position + x_BlC.shape[1]
            mask = self._model.attn_bias_for_masking[..., position:end, :end].to(x_BlC.dtype)
        x_BlC = x_BlC + self._places[:, position : position + x_BlC.shape[1]]
        of_block = (self._model.blocks, self._modulations, self._caches, self._constants)
        for block, modulation, cache, constants in zip(*of_block, strict=True):
            x_BlC = block(x_BlC, modulation, mask, cache, constants=constants)
        self._mask = None
        asked = sum(self._model.stages[self._stage : self._stage + stages])
        return self._model.logits(x_BlC[:, -asked:], self._head_modulation).float()

    def _inputs(self, stage: int) -> Tensor:
        """What a later stage reads of the latent so far, before `places`, [B, l, C]."""
        quantizer, latent = self._model.quantizer, self._latent
        if latent is None:
            side = quantizer.config.patch_nums[-1]
            latent = quantizer.codebook.new_zeros(1, quantizer.codebook.shape[1], side, side)
        inputs = self._model.embed(quantizer.seen_by(latent, stage))
        return inputs.repeat(len(self._condition) // len(inputs), 1, 1)

    def append(self, tokens_Bl: Tensor) -> None:
        """Give the tokens of the stage whose logits were read, int64 [B, l]."""
        quantizer, stage = self._model.quantizer, self._stage
        self._stage += 1
        if self._stage == len(self._model.stages):
            return
        added = quantizer.contribution(quantizer.codebook[tokens_Bl], stage)
        self._latent = added if self._latent is None else self._latent + added
        self._next_BlC = self._inputs(self._stage)

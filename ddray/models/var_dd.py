"""The Distilled Decoding student of VAR: the teacher's trunk over raw codes, with two heads.

Liu et al., "Distilled Decoding" (arXiv 2412.17153). It reads a sequence X_t whose first t scales
are data and the rest noise, and gives all tokens at once: as logits over the codebook and as
regressed codes. One more level than the teacher's comes first, the class. Parameter names are those
of the published students.

Shapes: B batch, L image tokens, S = 1 + L, V codebook size, E code width, C model width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddray.errors import ConfigError
from ddray.models.attention import tried_level_mask
from ddray.models.linear import Linear
from ddray.models.student_parts import CodeHead, told_apart
from ddray.models.var import VAR, VARTrunk
from ddray.models.var_blocks import Block, VARConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class VARStudentConfig(VARConfig):
    """Sizes of the student: the teacher's, and how noise and data are told apart.

    Attributes:
        n_d_embed_enable: whether an embedding tells noise from data.
        layerwise_n_d_embed: whether that embedding enters again in every block, between attention
            and feed-forward, and before the heads.
    """

    n_d_embed_enable: bool = True
    layerwise_n_d_embed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_nums[0] != 1:
            raise ConfigError(
                f"patch_nums={[*self.patch_nums]}: a student's scales begin with 1, as the level "
                "of its class has one position"
            )


class StudentBlock(Block):
    """A block of the student: all of it that is the same in every block is one call."""

    def forward(  # type: ignore[override]
        self,
        x_BSC: Tensor,
        condition: Tensor,
        is_data_BS1: Tensor,
        mark_2C: Tensor,
        mask: "Tensor | BlockMask",
    ) -> Tensor:
        """One block over [B, S, C].

        Args:
            x_BSC: the input.
            condition: as `modulation` takes it.
            is_data_BS1: bool, which positions are data.
            mark_2C: of noise and of data, added between attention and feed-forward.
            mask: added to the scores, or of tiles.
        """
        between = told_apart(is_data_BS1, mark_2C)
        return super().forward(x_BSC, self.modulation(condition), mask, between=between)


class VARStudent(VARTrunk):
    """All scales in one forward pass.

    A token sees itself and all tokens of earlier levels, but none of its own level's others.

    Args:
        config: sizes.
    """

    block = StudentBlock

    def __init__(self, config: VARStudentConfig):
        super().__init__(config, (1, *config.stages), sees_own_level=False)
        width = config.embed_dim
        if config.n_d_embed_enable:
            self.n_d_embed = nn.Embedding(2, width)
            if config.layerwise_n_d_embed:
                layers = (Linear(width, width) for _ in range(config.depth + 1))
                self.layerwise_n_d_embed = nn.ModuleList(layers)
        self.final_layer_conti = CodeHead(width, config.codebook_dim)
        self._block_mask: BlockMask | None = None

    def skip_masked_tiles(self, dtype: torch.dtype) -> None:
        """Let compiled blocks leave out what the mask hides, if that works on this device.

        Args:
            dtype: of queries, keys and values.
        """
        width = self.config.embed_dim // self.config.num_heads
        self._block_mask = tried_level_mask(self.lvl_1L[0], width, dtype)

    @property
    def code_layer(self) -> nn.Linear:
        """The layer that reads codes."""
        return self.word_embed

    def forward(self, x_BLE: Tensor, cond_B: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predict every token of X_t.

        Args:
            x_BLE: float32 [B, L, E], codes of the first t scales, noise behind them.
            cond_B: int64 class ids [B].
            t_B: number of leading scales that are data, any dtype [B].

        Returns:
            Logits [B, L, V] in the network's dtype and float32 codes [B, L, E], both at the
            position they describe.
        """
        condition = self.class_emb(cond_B)
        codes = self.word_embed(x_BLE.to(condition.dtype))
        first = (condition[:, None] + self.pos_start).to(codes.dtype)
        x_BSC = torch.cat((first, codes), 1) + self.places()
        is_data_BS1 = (self.lvl_1L <= t_B[:, None])[..., None]
        at_input, *inside, before_heads = self._marks()
        x_BSC = x_BSC + told_apart(is_data_BS1, at_input)
        mask = self._block_mask or self.attn_bias_for_masking.to(x_BSC.dtype)
        for_blocks = self.for_blocks(condition)
        for block, mark in zip(self.blocks, inside, strict=True):
            x_BSC = block(x_BSC, for_blocks, is_data_BS1, mark, mask)
        x_BLC = (x_BSC + told_apart(is_data_BS1, before_heads))[:, 1:]
        logits_BLV = self.logits(x_BLC, self.head_nm.modulation(condition))
        return logits_BLV, self.final_layer_conti(x_BLC, condition[:, None])

    def _marks(self) -> list[Tensor]:
        """What is added to noise and to data: at the input, inside every block, before the heads.

        Each is [2, C]: a layer acts on two rows, not on all positions.
        """
        none = self.pos_start.new_zeros(2, 1)
        if not hasattr(self, "n_d_embed"):
            return [none] * (len(self.blocks) + 2)
        either = self.n_d_embed.weight
        layers = getattr(self, "layerwise_n_d_embed", None)
        if layers is None:
            return [either, *[none] * (len(self.blocks) + 1)]
        return [either, *(layer(either) for layer in layers)]

    @torch.no_grad()
    def init_from_teacher(
        self, teacher: VAR, codebook_VE: Tensor, *, faithful_to_upstream: bool = False
    ) -> None:
        """Start from the teacher, whose levels are this network's from the second on.

        Copied are input layer, class table, blocks, head norm and logits; level and position
        embeddings move up by one level. New are the level and the position of the class, and what
        tells data from noise: its layers start at zero, so that at first nothing is disturbed.

        The published code draws the new level's embedding into row 1 of the class table instead,
        and so overwrites a class.

        Args:
            teacher: the autoregressive model.
            codebook_VE: float [V, E]; not used here, the teacher's input layer takes codes.
            faithful_to_upstream: repeat that slip, and leave what the published code leaves alone.
        """
        if not faithful_to_upstream:
            self.init_weights()
            for layer in getattr(self, "layerwise_n_d_embed", ()):
                nn.init.zeros_(layer.weight)
        theirs = teacher.state_dict()
        moved = {"lvl_embed.weight", "pos_1LC", "lvl_1L", "attn_bias_for_masking"}
        self.load_state_dict({k: v for k, v in theirs.items() if k not in moved}, strict=False)
        self.lvl_embed.weight[0] = theirs["lvl_embed.weight"][0]
        self.lvl_embed.weight[2:] = theirs["lvl_embed.weight"][1:]
        self.pos_1LC[:, 0] = theirs["pos_1LC"][:, 0]
        self.pos_1LC[:, 2:] = theirs["pos_1LC"][:, 1:]
        new_level = self.class_emb if faithful_to_upstream else self.lvl_embed
        fresh = [new_level.weight[1], self.pos_1LC[:, 1]]
        if hasattr(self, "n_d_embed"):
            fresh.append(self.n_d_embed.weight)
        for rows in fresh:
            nn.init.trunc_normal_(rows, std=0.02)

"""A bidirectional transformer that fills masked tokens in: the network of masked decoding.

Chang et al., "MaskGIT: masked generative image transformer" (arXiv 2202.04200). Blocks, class
table and caption embedding are LlamaGen's; a position sees all others.

Shapes: B batch, T condition tokens, L image tokens of all scales, S = T + L, V codebook size, C
model width, D rotation pairs of a head.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ddray.method.conditioning import Captions, Condition
from ddray.method.student import stage_of_tokens
from ddray.models.attention import grid_angles
from ddray.models.llamagen import LlamaGenConfig, LlamaGenTrunk
from ddray.models.var_blocks import VARConfig
from ddray.models.var_vq import check_patch_nums


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(LlamaGenConfig):
    """Sizes of a masked transformer: LlamaGen's, and the scales of its tokens.

    Attributes:
        patch_nums: cells along a side, scale by scale, where the tokens are VAR's; `block_size` is
            then the tokens of the last scale. None = LlamaGen's tokens.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    patch_nums: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.patch_nums is not None:
            object.__setattr__(self, "patch_nums", check_patch_nums(self.patch_nums))
            object.__setattr__(self, "block_size", self.sides[-1] ** 2)
        super().__post_init__()

    @property
    def sides(self) -> tuple[int, ...]:
        """Cells along a side of every scale."""
        return self.patch_nums or (self.grid,)

    @property
    def stages(self) -> tuple[int, ...]:
        """Tokens of each autoregressive step of a teacher of the same tokens."""
        return tuple(p * p for p in self.patch_nums) if self.patch_nums else (1,) * self.block_size


def masked_sizes(teacher: LlamaGenConfig | VARConfig) -> MaskedConfig:
    """Sizes of a masked transformer of about as many parameters as a teacher.

    LlamaGen's are its own. A block of VAR has in its modulation what other blocks lack, so there
    are more of them in its stead.
    """
    if isinstance(teacher, LlamaGenConfig):
        return MaskedConfig(**asdict(teacher))
    of_block = 4 + 2 * teacher.mlp_ratio + (0 if teacher.shared_aln else 6)
    return MaskedConfig(
        dim=teacher.embed_dim,
        # Of LlamaGen's blocks, in matrices of C x C: 4 and 8.
        n_layer=max(1, round(teacher.depth * of_block / 12)),
        n_head=teacher.num_heads,
        vocab_size=teacher.vocab_size,
        num_classes=teacher.num_classes,
        patch_nums=teacher.patch_nums,
        multiple_of=64,
    )


def _rotations(config: MaskedConfig, device: torch.device) -> Tensor:
    """Rotations of all positions: a cell of any scale turns with its place in the image.

    Condition tokens do not turn.

    Returns:
        float32 [T + L, D, 2].
    """
    last = config.sides[-1]
    angles = [torch.zeros(config.cls_token_num, config.head_dim // 2, device=device)]
    for side in config.sides:
        middle = (torch.arange(side, device=device) + 0.5) * (last / side) - 0.5
        angles.append(grid_angles(middle, config.head_dim, config.rope_base))
    angle = torch.cat(angles)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


class MaskedTransformer(LlamaGenTrunk):
    """Logits of all tokens, from those that are known.

    Args:
        config: sizes.
    """

    rope_table = staticmethod(_rotations)  # type: ignore[assignment]
    no_guidance = 1.0

    def __init__(self, config: MaskedConfig):
        super().__init__(config)
        self.config = config
        self.stages = config.stages
        self.mask_id = config.vocab_size
        # The last row is the mask's.
        self.tok_embeddings = nn.Embedding(config.vocab_size + 1, config.dim)
        self.pos_embed = nn.Embedding(sum(self.stages), config.dim)
        self.lvl_embed = nn.Embedding(len(config.sides), config.dim)

    def forward(self, tokens_BL: Tensor, cond: Condition) -> Tensor:
        """Predict every token, known or not.

        Args:
            tokens_BL: int64 [B, L]; `mask_id` = V where a token is not known.
            cond: int64 class ids [B], the null class included, or captions.

        Returns:
            Logits [B, L, V] in the network's dtype.
        """
        tokens = self.tok_embeddings(tokens_BL) + self._places()
        condition = self.cls_embedding(cond)
        x_BSC = torch.cat((condition.to(tokens.dtype), tokens), 1)
        hidden = self.hidden(x_BSC, self.attention_mask(cond, x_BSC.shape[1]))
        return self.logits(hidden[:, -tokens_BL.shape[1] :])

    def _places(self) -> Tensor:
        """What position and scale add to a token's embedding, [L, C]."""
        position_LC = self.pos_embed.weight
        scales = tuple(side * side for side in self.config.sides)
        out: Tensor = position_LC + self.lvl_embed(stage_of_tokens(scales, position_LC.device))
        return out

    def attention_mask(self, cond: Condition, length: int) -> Tensor:
        """Which positions are seen by all, bool [B or 1, 1, 1, length]: not a caption's padding."""
        if isinstance(cond, Captions):
            seen = nn.functional.pad(cond.mask_BT, (0, length - cond.mask_BT.shape[1]), value=True)
            return seen[:, None, None]
        return torch.ones(1, 1, 1, length, dtype=torch.bool, device=cond.device)

"""The head by which a student of either family gives codes instead of token ids.

Liu et al., "Distilled Decoding" (arXiv 2412.17153). Parameter names are those of the published
students.

Shapes: B batch, L tokens, E code width, C model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeHead(nn.Module):
    """Regression head: plain LayerNorm, shift and scale from the condition, one linear layer."""

    def __init__(self, dim: int, code_dim: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.linear = nn.Linear(dim, code_dim)

    def forward(self, x_BLC: Tensor, condition_B1C: Tensor) -> Tensor:
        """Hidden states and class embedding to float32 codes [B, L, E]; the table: shift, scale."""
        shift, scale = (self.scale_shift_table + condition_B1C).chunk(2, dim=1)
        normed = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=1e-6)
        out: Tensor = self.linear(normed * (1 + scale) + shift)
        return out.float()

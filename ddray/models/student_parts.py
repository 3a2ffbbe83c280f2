"""What students of both families share: marks of noise and data, and the head that gives codes.

Liu et al., "Distilled Decoding" (arXiv 2412.17153). Parameter names are those of the published
students.

Shapes: B batch, L tokens, S positions, E code width, C model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def told_apart(is_data_BS1: Tensor, mark_2C: Tensor) -> Tensor:
    """The mark of every position, [B, S, C]: row 0 for noise, row 1 for data.

    Not by indexing: the gradient of an index adds position after position to one of two rows, in
    the row's own dtype. In bfloat16 such a sum stops growing, and on a GPU it takes longer than the
    rest of a training step.
    """
    return torch.where(is_data_BS1, mark_2C[1], mark_2C[0])


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

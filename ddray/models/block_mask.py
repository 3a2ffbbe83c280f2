"""Attention between levels that leaves out what the mask hides, tile by tile, on a GPU.

Of the scores of VAR's student 45 % are masked; a mask that is added hides them when they are
computed. FlexAttention (torch, arXiv 2412.05496) does not compute the tiles of 128 x 128 that are
hidden whole: 29 % of 681 positions'. It needs torch's compiler.

Shapes: L positions, h head width.
"""

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import one_line

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Of the largest number; bfloat16 alone makes 1 % of a gradient.
_TOLERANCE = 0.03


def level_mask(level_L: Tensor) -> "BlockMask":
    """A position sees itself and the levels before its own.

    Args:
        level_L: int64, the level of each position, on any device.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, position: Tensor, other: Tensor) -> Tensor:
        return (level_L[other] < level_L[position]) | (other == position)

    length = len(level_L)
    return create_block_mask(sees, None, None, length, length, device=level_L.device)


def tried_level_mask(level_L: Tensor, head_width: int, dtype: torch.dtype) -> "BlockMask | None":
    """The mask of `level_mask`, if attention by it works on its device and gives what is right.

    It is tried once, forward and backward, against an added mask. Where it fails one line of
    warning says so: a surprise on new hardware costs speed and never a wrong gradient.

    Args:
        level_L: int64, the level of each position, on the device.
        head_width: h.
        dtype: of queries, keys and values.
    """
    try:
        mask = level_mask(level_L)
        error = _relative_error(mask, level_L, head_width, dtype)
        if error <= _TOLERANCE:
            return mask
        reason = f"its numbers are off by {error:.0%}"
    except Exception as error:  # whatever compilers and drivers say
        reason = one_line(error)
    warnings.warn(
        f"FlexAttention does not work on {level_L.device}, and attention with an added mask takes "
        f"its place, which is slower: {reason}",
        stacklevel=2,
    )
    return None


def _relative_error(
    mask: "BlockMask", level_L: Tensor, head_width: int, dtype: torch.dtype
) -> float:
    """Largest difference of outputs and gradients from those of an added mask, over the largest."""
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator(level_L.device).manual_seed(0)
    shape = (3, 1, 2, len(level_L), head_width)
    drawn = torch.randn(shape, generator=generator, device=level_L.device, dtype=dtype)
    by_tiles, plain = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    sees = (level_L < level_L[:, None]) | torch.eye(len(level_L), device=level_L.device).bool()
    (q, k, v), (qp, kp, vp) = by_tiles.unbind(), plain.unbind()
    outputs = (
        torch.compile(flex_attention, fullgraph=True)(q, k, v, block_mask=mask),
        F.scaled_dot_product_attention(qp, kp, vp, attn_mask=sees),
    )
    for output in outputs:
        output.float().square().sum().backward()
    assert by_tiles.grad is not None and plain.grad is not None
    pairs = (outputs, (by_tiles.grad, plain.grad))
    with torch.no_grad():
        errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return float(torch.stack(errors).max())

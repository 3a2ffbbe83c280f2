"""What attention is made of beside products: cached keys and values, rotations, tiles left out.

Of the scores of VAR's student 45 % are masked; a mask that is added hides them when they are
computed. FlexAttention (torch, arXiv 2412.05496) does not compute the tiles of 128 x 128 that are
hidden whole: 29 % of 681 positions'. It needs torch's compiler, and a GPU to be worth it.

Shapes: B batch, H heads, S all positions, l positions of this step, L positions, h head width, G
cells along a side, D = h / 2 rotation pairs.
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


class KeyValueCache:
    """Keys and values of one layer, [B, H, S, h] each, written in place.

    Args:
        shape: (B, H, S, h).
        like: a tensor that has the cache's dtype and device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor):
        self._both_2BHSh = like.new_empty((2, *shape))
        self.length = 0

    def append(self, keys_BHlh: Tensor, values_BHlh: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next l positions; views of everything written so far."""
        here_2BHlh = self._both_2BHSh[:, :, :, self.length : self.length + keys_BHlh.shape[2]]
        here_2BHlh[0], here_2BHlh[1] = keys_BHlh, values_BHlh
        return self._grown(keys_BHlh.shape[2])

    def append_both(self, both_2BHlh: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, where keys and values lie in one tensor: one copy."""
        length = both_2BHlh.shape[3]
        self._both_2BHSh[:, :, :, self.length : self.length + length] = both_2BHlh
        return self._grown(length)

    def _grown(self, length: int) -> tuple[Tensor, Tensor]:
        self.length += length
        keys, values = self._both_2BHSh[:, :, :, : self.length].unbind()
        return keys, values


def attend(
    q_BHlh: Tensor,
    k_BHSh: Tensor,
    v_BHSh: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention by torch, [B, H, l, h] in the dtype of the values.

    Where a training on a CPU computes in half precision, this is done in float32: torch's gradient
    of it takes three times as long in bfloat16, a good half of a step.
    """
    dtype = v_BHSh.dtype
    if dtype != torch.float32 and q_BHlh.device.type == "cpu" and torch.is_grad_enabled():
        q_BHlh, k_BHSh, v_BHSh = q_BHlh.float(), k_BHSh.float(), v_BHSh.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False):
            return attend(q_BHlh, k_BHSh, v_BHSh, mask, is_causal=is_causal, scale=scale).to(dtype)
    return F.scaled_dot_product_attention(
        q_BHlh, k_BHSh, v_BHSh, attn_mask=mask, is_causal=is_causal, scale=scale
    )


def grid_angles(place_G: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles of the channel pairs of every cell of a grid: its row's, then its column's.

    Args:
        place_G: float, where the rows and columns lie.
        head_dim: width h of a head, a multiple of 4.
        base: of the frequencies.

    Returns:
        float32 [G G, D].
    """
    axis_pairs = head_dim // 4
    exponent = torch.arange(axis_pairs, device=place_G.device).float() / axis_pairs
    along = torch.outer(place_G, base**-exponent)
    rows = along[:, None].expand(-1, len(place_G), -1)
    columns = along[None].expand(len(place_G), -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn interleaved channel pairs (2p, 2p + 1) in float32, and give the input's dtype back.

    A product of complex numbers is one kernel, but torch's compiler has no code for it.

    Args:
        x: [..., h].
        rotation: float32 cosine and sine, broadcast to [..., D, 2].
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (even, odd), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


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

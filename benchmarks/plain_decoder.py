"""A tokenizer's decoder in plain operations: what ddray's is timed beside and tested against.

As it stands in the papers and as ddray had it up to commit 047246d: all images at once, a
convolution after a repetition of pixels, a new tensor for every step.

Shapes: B batch, X any channel count, H and W pixels or cells.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ddray.models.autoencoder import Decoder, ResidualBlock, SpatialAttention, Upsample


def plain_decode(decoder: Decoder, latent_BXHW: Tensor) -> Tensor:
    """What `decoder(latent_BXHW)` computes."""
    h = _plainly(decoder.mid, decoder.conv_in(latent_BXHW))
    for level in decoder._running_levels():
        h = _plainly(level, h)
    image: Tensor = decoder.conv_out(F.silu(decoder.norm_out(h)))
    return image


def _plainly(part: Any, x_BXHW: Tensor) -> Tensor:
    if isinstance(part, ResidualBlock):
        h = part.conv1(F.silu(part.norm1(x_BXHW)))
        h = part.conv2(F.silu(part.norm2(h)))
        shortcut = part.nin_shortcut(x_BXHW) if hasattr(part, "nin_shortcut") else x_BXHW
        out: Tensor = shortcut + h
        return out
    if isinstance(part, SpatialAttention):
        normed = part.norm(x_BXHW)
        fused = hasattr(part, "qkv")
        qkv = (
            part.qkv(normed).chunk(3, 1) if fused else [f(normed) for f in (part.q, part.k, part.v)]
        )
        q, k, v = (y.flatten(2).transpose(1, 2)[:, None] for y in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        out = x_BXHW + part.proj_out(mixed.unflatten(-1, x_BXHW.shape[-2:]))
        return out
    if isinstance(part, Upsample):
        out = part.conv(F.interpolate(x_BXHW, scale_factor=2.0, mode="nearest"))
        return out
    if isinstance(part, nn.Sequential):
        for step in part:
            x_BXHW = _plainly(step, x_BXHW)
        return x_BXHW
    for i, block in enumerate(part.get_submodule(part._blocks).children()):
        x_BXHW = _plainly(block, x_BXHW)
        if len(part.attn):
            x_BXHW = _plainly(part.attn[i], x_BXHW)
    return _plainly(part.upsample, x_BXHW) if hasattr(part, "upsample") else x_BXHW

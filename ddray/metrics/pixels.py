"""What a feature network is shown: 8-bit pixels, and the ways of the field to resize them.

Two FIDs of the same images differ first of all here (docs/evaluating.md).

Shapes: N images, H and W pixels, S pixels a side after resizing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import ConfigError


def eight_bit(images: Tensor) -> Tensor:
    """Images as the pixels of a file: the one place where the metrics round.

    Args:
        images: float, any shape, in [0, 1]; values beyond are clipped.

    Returns:
        uint8 of the same shape: the nearest level, halves to the even one, as `np.rint` does.
    """
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def as_pixels(images: Tensor, channels: int = 3) -> Tensor:
    """Images channels first.

    Args:
        images: uint8 [N, H, W, C] or [N, C, H, W].
        channels: C, 3 or 1.

    Returns:
        A view, uint8 [N, C, H, W].

    Raises:
        ConfigError: for another dtype or shape: no metric guesses how grey, transparent or 16-bit
            images are meant.
    """
    if images.dtype != torch.uint8:
        raise ConfigError(f"images are {images.dtype}; uint8 is needed: round them by eight_bit")
    if images.ndim == 4 and images.shape[-1] == channels:
        return images.movedim(-1, 1)
    if images.ndim == 4 and images.shape[1] == channels:
        return images
    kind = "colour" if channels == 3 else "grey"
    raise ConfigError(
        f"images have shape {[*images.shape]}; {kind} images are needed, [N, H, W, {channels}] or "
        f"[N, {channels}, H, W]"
    )


def resize_pytorch_fid(pixels: Tensor, size: int) -> Tensor:
    """Bilinear between pixel centres without antialiasing, as pytorch-fid does.

    Args:
        pixels: float [N, 3, H, W].
        size: S.

    Returns:
        float [N, 3, S, S].
    """
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)


def resize_tensorflow(pixels: Tensor, size: int) -> Tensor:
    """Bilinear between pixel corners, as TensorFlow 1 does: in ADM's evaluator and torch-fidelity.

    Arguments and result as of `resize_pytorch_fid`.
    """
    return _along(_along(pixels, 2, size), 3, size)


def _along(pixels: Tensor, dim: int, size: int) -> Tensor:
    length = pixels.shape[dim]
    # In float32, as TensorFlow has it: the place of a pixel decides its weight.
    place = torch.arange(size, device=pixels.device) * torch.tensor(length / size)
    low = place.floor().long()
    high = (low + 1).clamp(max=length - 1)
    weight = (place - low).to(pixels.dtype)
    weight = weight.view([-1 if k == dim else 1 for k in range(pixels.ndim)])
    return torch.lerp(pixels.index_select(dim, low), pixels.index_select(dim, high), weight)


def resize_bicubic(pixels: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, as what DINOv2 and CLIP are shown.

    Arguments and result as of `resize_pytorch_fid`; clipped to the range of a pixel, [0, 255].
    """
    resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255)


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pytorch-fid": resize_pytorch_fid,
    "tensorflow": resize_tensorflow,
    "bicubic": resize_bicubic,
}

"""What an image is asked for by: a class id, or the features of a caption.

Shapes: B batch, T caption positions, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddray.errors import ConfigError


@dataclass(frozen=True)
class Captions:
    """Caption features of a batch, padded on the left as LlamaGen reads them.

    Attributes:
        features_BTD: float; padded rows are zero.
        mask_BT: bool, True where a position belongs to the caption.
    """

    features_BTD: Tensor
    mask_BT: Tensor

    def __len__(self) -> int:
        return len(self.mask_BT)

    def __getitem__(self, rows: slice | Tensor) -> "Captions":
        """Some rows, as of a tensor of class ids."""
        return Captions(self.features_BTD[rows], self.mask_BT[rows])

    def pooled(self, x_BTC: Tensor) -> Tensor:
        """Mean of per-position states over each caption's own positions, [B, 1, C]."""
        weight = self.mask_BT[..., None].to(x_BTC.dtype)
        return (x_BTC * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)


Condition = Tensor | Captions
"""int64 class ids [B], or captions."""


def class_ids(cond_B: Any, num_classes: int, device: torch.device) -> Tensor:
    """Class ids as int64 [B] on the device.

    Raises:
        ConfigError: for an id outside 0..num_classes (num_classes is the null class).
    """
    if isinstance(cond_B, tuple | list) and len(cond_B) and isinstance(cond_B[0], Tensor):
        raise ConfigError("this model is conditioned on classes, not on captions")
    # Looked at where they come from: on a GPU the host would wait for the answer.
    try:
        cond = torch.as_tensor(cond_B)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"classes must be a 1-D list of integers, got {cond_B!r}") from error
    if cond.dim() != 1 or not len(cond) or cond.is_floating_point():
        raise ConfigError(
            f"classes must be a 1-D list of at least one integer, got {cond.dtype} {[*cond.shape]}"
        )
    wrong = cond[(cond < 0) | (cond > num_classes)]
    if len(wrong):
        raise ConfigError(
            f"class {int(wrong[0])} is out of range: 0 to {num_classes - 1}, or {num_classes} for "
            "the null class"
        )
    return cond.long().to(device)


def left_padded(cond: Any, length: int, width: int, device: torch.device) -> Captions:
    """Captions from an encoder's right-padded features and mask.

    The valid rows move to the end, which is where the image tokens follow; padded rows become zero.

    Args:
        cond: features float [B, T, D] and mask [B, T], 1 or True = valid.
        length: caption positions of the model; shorter T is padded.
        width: D of the model.
        device: of the result.

    Raises:
        ConfigError: for other shapes, features that are no floating point or not finite, a caption
            that is too long, or a mask with holes.
    """
    pair = isinstance(cond, tuple | list) and len(cond) == 2
    if not pair or not all(hasattr(part, "shape") for part in cond):
        raise ConfigError(
            "captions are a list of texts, or a pair: features [B, T, D] and mask [B, T]"
        )
    features, mask = (torch.as_tensor(part, device=device) for part in cond)
    if features.dim() != 3 or features.shape[2] != width or features.shape[:2] != mask.shape:
        raise ConfigError(
            f"captions are {[*features.shape]} with mask {[*mask.shape]}, expected [B, T, {width}] "
            "and [B, T]"
        )
    if not len(features) or features.shape[1] > length:
        raise ConfigError(
            f"captions have {len(features)} rows of {features.shape[1]} positions; the model takes "
            f"at least one row and at most {length} positions"
        )
    if not features.is_floating_point():
        raise ConfigError(f"features are {features.dtype}, expected floating point")
    valid = mask != 0
    count = valid.sum(1)
    has_holes = (valid[:, 1:] & ~valid[:, :-1]).any()
    is_broken = (valid & ~features.isfinite().all(-1)).any()
    if bool(has_holes | is_broken):  # once: on a GPU the host waits for the answer
        if bool(has_holes):
            raise ConfigError("a caption's mask has holes; captions are padded on the right")
        raise ConfigError("a caption's features are not all finite")
    missing = length - features.shape[1]
    features = torch.nn.functional.pad(features, (0, 0, 0, missing))
    position = torch.arange(length, device=device)
    source = (position[None] + count[:, None]) % length
    moved = features.gather(1, source[..., None].expand_as(features))
    new_mask = position[None] >= length - count[:, None]
    return Captions(moved.masked_fill(~new_mask[..., None], 0.0), new_mask)


def concatenate(first: Condition, second: Condition) -> Condition:
    """Both batches as one."""
    if isinstance(first, Captions) and isinstance(second, Captions):
        return Captions(
            torch.cat((first.features_BTD, second.features_BTD)),
            torch.cat((first.mask_BT, second.mask_BT)),
        )
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat((first, second))


def choose(first_B: Tensor, first: Condition, second: Condition) -> Condition:
    """Rows of the first batch where a mask is true, else of the second; masks are the second's."""
    if isinstance(first, Captions) and isinstance(second, Captions):
        features = torch.where(first_B[:, None, None], first.features_BTD, second.features_BTD)
        return Captions(features, second.mask_BT)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.where(first_B, first, second)


def as_tensors(cond: Condition) -> tuple[Tensor, ...]:
    """A condition as the tensors that it is made of."""
    return (cond.features_BTD, cond.mask_BT) if isinstance(cond, Captions) else (cond,)


def from_tensors(parts: Sequence[Tensor]) -> Condition:
    """The condition that is made of tensors, as `as_tensors` gave them."""
    return parts[0] if len(parts) == 1 else Captions(*parts)

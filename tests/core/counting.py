"""Operations as torch counts them, oneDNN's products among them."""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _product(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of shapes [..., in] and [out, in]; a multiplication and an addition are two operations."""
    return 2 * prod(x) * weight[0]


def counter() -> FlopCounterMode:
    """A counter to work under."""
    by_name = {torch.ops.mkldnn._linear_pointwise: _product}
    return FlopCounterMode(display=False, custom_mapping=by_name)

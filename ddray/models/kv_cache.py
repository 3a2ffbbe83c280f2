"""Keys and values of the positions that a decoder has been through.

Shapes: B batch, H heads, S all positions, l positions of this step, h head width.
"""

from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer, [B, H, S, h], written in place.

    Args:
        shape: (B, H, S, h).
        like: a tensor that has the cache's dtype and device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor):
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0

    def append(self, keys_BHlh: Tensor, values_BHlh: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next l positions; views of everything written so far."""
        end = self.length + keys_BHlh.shape[2]
        self.keys[:, :, self.length : end] = keys_BHlh
        self.values[:, :, self.length : end] = values_BHlh
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

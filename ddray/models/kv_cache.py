"""Keys and values of the positions that a decoder has been through.

Shapes: B batch, H heads, S all positions, l positions of this step, h head width.
"""

from torch import Tensor


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

"""Whether kernels of ddray's own run on a device: they are tried once, and checked."""

import importlib.util
import warnings
from functools import cache

import torch

from ddray.errors import one_line


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether Triton compiles and launches here, with the right result.

    It needs a C compiler on the machine, which an image for a cluster may lack. Where it fails the
    torch operations take its place, and one line of warning says so: a surprise on new hardware
    costs speed and never a wrong number.

    Args:
        device: of the tensors.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from ddray.method import seeding, seeding_triton

        index = torch.tensor([0, 2**40], device=device)
        made = seeding_triton.noise(7, index, 6, seeding.NOISE_STREAM)
        expected = seeding.normals(7, index, 6)
        if torch.allclose(made, expected, rtol=0, atol=1e-6):
            return True
        reason = "its numbers are not those of torch"
    except Exception as error:  # whatever compilers and drivers say
        reason = one_line(error)
    warnings.warn(
        f"Triton does not work on {device}, and torch operations take its place, which are slower: "
        f"{reason}",
        stacklevel=2,
    )
    return False

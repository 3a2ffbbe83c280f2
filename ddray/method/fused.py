"""Whether kernels of ddray's own run on a device: they are tried once, and checked."""

import importlib.util
import warnings
from functools import cache

import torch

from ddray.errors import one_line

# The first numbers of noise of a seed and two indices (`ddray.method.seeding.normals`).
_SEED, _INDEX, _STREAM = 7, (0, 2**40), 0
_NOISE = (
    (0.00029156741220504045, -0.30484697222709656),
    (0.2020382434129715, -2.440523147583008),
)


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
        from ddray.method import seeding_triton

        index = torch.tensor(_INDEX, device=device)
        made = seeding_triton.noise(_SEED, index, len(_NOISE[0]), _STREAM)
        if torch.allclose(made.cpu(), torch.tensor(_NOISE), rtol=0, atol=1e-6):
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

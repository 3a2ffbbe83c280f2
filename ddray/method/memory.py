"""Memory that does not suffice, said in terms of what was asked for."""

import contextlib
from collections.abc import Iterator

import torch

from ddray.errors import ConfigError, one_line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, was what could not be had."""
    # PyTorch has no class of its own for a CPU that has none left.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def in_memory(rows: int, device: torch.device, advice: str) -> Iterator[None]:
    """Within, so many images are made together.

    Args:
        rows: images.
        device: where.
        advice: what to lower, as an imperative.

    Raises:
        ConfigError: where memory does not suffice for them.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
        raise ConfigError(
            f"the memory of {where} does not suffice for {rows} images at once; {advice} "
            f"({one_line(error)})"
        ) from error

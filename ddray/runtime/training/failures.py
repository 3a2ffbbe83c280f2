"""Failures of a worker that other libraries report in their own ways, told by what they mean."""

import socket

import torch

from ddray.config.distillation import DistillConfig
from ddray.errors import one_line


def out_of_memory(error: BaseException, config: DistillConfig, workers: int) -> str:
    """What to do about a worker that got no more memory."""
    rows = config.batch_size // workers // config.accumulation
    peak = ""
    if config.use_gpu and torch.cuda.is_available():
        peak = f" at {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return (
        f"out of memory on {socket.gethostname()}{peak} with {rows} trajectories at once "
        f"(batch_size={config.batch_size} over {workers} workers, "
        f"accumulation={config.accumulation}): {one_line(error)}; raise accumulation, set "
        "activation_checkpointing, raise zero, or lower batch_size"
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    # PyTorch reports its own failed write, and Arrow its own, both without the reason's number.
    signs = ("No space left", "PytorchStreamWriter failed", "inline_container", "Disk quota")
    return any(sign in str(error) for sign in signs)

"""Distillation in plain torch: at which stages a step jumps, how the rate moves, what is averaged.

All of it is a function of the step alone, so a run that resumes, or runs on another number of
workers, goes on as if nothing had happened; so are the rows of a step (ddray.distillation.stream).

Shapes: B rows of this worker, V codebook size, E code width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddray.config.distillation import DistillConfig
from ddray.distillation.losses import Judge, Losses, distillation_loss
from ddray.distillation.stream import Batch
from ddray.method.fused import can_fuse


def jump_stages(schedule: Sequence[int], first: int, count: int, device: torch.device) -> Tensor:
    """The t of every row, int64 [B]: the schedule's stages take turns along the stream."""
    turns = [schedule[position % len(schedule)] for position in range(first, first + count)]
    # Pinned memory goes over while the host goes on.
    stages_B = torch.tensor(turns, dtype=torch.int64, pin_memory=device.type == "cuda")
    return stages_B.to(device, non_blocking=True)


def default_code_precision(stages: Sequence[int]) -> float:
    """Weight of a student's code head in reading tokens: what served the bundled models best.

    Where a stage is one token, 8. Codes of a coarse scale stand for much of the image and lie far
    apart, so a regressed mean between them says little: 0 where a stage is a scale.
    """
    return 0.0 if max(stages) > 1 else 8.0


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float = 1.0) -> float:
    """Linear warm-up over a share of the steps, the peak, a cosine to zero over the last share.

    A short run learns more at the peak than it loses by a late descent; `decay` = 1 is the plain
    cosine.
    """
    rise = min((step + 1) / max(1.0, warmup * steps), 1.0)
    fall = max(0.0, (step - (1 - decay) * steps) / (decay * steps))
    return peak * rise * (0.5 + 0.5 * math.cos(math.pi * fall))


def parameter_groups(
    network: nn.Module, codebook_VE: Tensor, weight_decay: float
) -> list[dict[str, Any]]:
    """A network's parameters as an optimizer takes them: the layer that reads codes by itself.

    Its inputs are as small as the codes are (numbers of size 1 / sqrt(E) on the unit sphere), so
    its weights have to be large; at the common rate they would move too slowly. Adam with inputs
    scaled to size one is the same as a rate, and a reciprocal decay, that carry the factor. A
    network that reads tokens has no such layer.

    Returns:
        Groups with "lr_factor", for `set_learning_rate`.
    """
    if not hasattr(network, "code_layer"):
        parameters = [*network.parameters()]
        return [{"params": parameters, "lr_factor": 1.0, "weight_decay": weight_decay}]
    reads_codes: nn.Parameter = network.code_layer.weight  # type: ignore[union-attr, assignment]
    factor = 1 / float(codebook_VE.square().mean().sqrt())
    others = [parameter for parameter in network.parameters() if parameter is not reads_codes]
    return [
        {"params": others, "lr_factor": 1.0, "weight_decay": weight_decay},
        {"params": [reads_codes], "lr_factor": factor, "weight_decay": weight_decay / factor},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def recompute_activations(network: nn.Module) -> None:
    """Let every block keep its input alone, and compute the rest again in the backward pass.

    The gradients are the same; memory falls to that of one block, for a third more work.
    """
    for block in blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def is_compiled(config: DistillConfig, device: torch.device) -> bool:
    """Whether torch's compiler is asked for, and can do its work.

    Where a GPU's node has no C compiler, or a GPU that Triton does not know, one line says so.
    """
    return config.compile and (not config.use_gpu or can_fuse(device))


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Let torch's compiler write the kernels of the blocks: one block's serve all.

    Not of the whole network: that would take as much longer to compile as there are blocks, and its
    gradients would all be there at once, behind the backward pass, with nothing left to compute
    while they travel.

    Args:
        network: a student.
        backend: of torch.compile.
    """
    for block in blocks(network):
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)


def blocks(network: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a network of any family."""
    found: nn.ModuleList = getattr(network, "layers", None) or network.blocks  # type: ignore[assignment]
    return found


class MovingAverage:
    """Exponential moving average of weights in float32.

    It works element by element, so an average of a partition is the partition of the average
    (ZeRO stage 3).

    Args:
        tensors: the weights, or this worker's partitions of them.
        decay: per step; early steps use less, so that the start is soon forgotten.
    """

    def __init__(self, tensors: Iterable[Tensor], decay: float):
        self._decay = decay
        self.average = [tensor.detach().float().clone() for tensor in tensors]

    @torch.no_grad()
    def update(self, tensors: Iterable[Tensor], step: int) -> None:
        """Move towards the weights after `step` (counted from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = [tensor.detach().float() for tensor in tensors]
        torch._foreach_lerp_(self.average, current, 1 - decay)


def batch_loss(
    network: Callable[..., tuple[Tensor, Tensor]],
    batch: Batch,
    stages: tuple[int, ...],
    codebook_VE: Tensor,
    *,
    first: int,
    schedule: Sequence[int],
    logits_weight: float,
    code_weight: float,
    judge: Judge | None = None,
) -> Losses:
    """Losses of the rows at stream positions first, ..., first + B - 1."""
    return distillation_loss(
        network,
        stages,
        codebook_VE,
        batch.noise_BLE,
        batch.tokens_BL,
        batch.cond_B,
        jump_stages(schedule, first, len(batch.index_B), codebook_VE.device),
        logits_weight=logits_weight,
        code_weight=code_weight,
        judge=judge,
    )

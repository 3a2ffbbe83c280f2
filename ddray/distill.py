"""Distillation in plain torch: which rows a step reads, how the rate moves, what is averaged.

All of it is a function of the step alone, so a run that resumes, or runs on another number of
workers, goes on as if nothing had happened. Imports ddray.losses, seeding and shards; the loop
around it is ddray.runtime.training.

Shapes: B rows of this worker, L tokens, E code width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddray.conditioning import Condition
from ddray.errors import ConfigError
from ddray.losses import Losses, distillation_loss
from ddray.seeding import noise


class TrajectoryBatches:
    """Rows of a trajectory set in memory, in an order that depends on (seed, step) alone.

    Every epoch is a permutation of all rows; a batch may span two epochs, so no row is left out.

    Args:
        index: int64 [N], sample indices: they name the noise.
        label: int [N], classes.
        tokens: unsigned int [N, L].
        noise_seed: seed of the set.
        seed: of the order.
        condition: what the network takes for rows, given their numbers; None = their classes.
    """

    def __init__(
        self,
        index: np.ndarray,
        label: np.ndarray,
        tokens: np.ndarray,
        noise_seed: int,
        seed: int,
        condition: Callable[[np.ndarray], Condition] | None = None,
    ):
        if not len(index):
            raise ConfigError("the trajectory set has no rows to train on")
        self._index, self._label, self._tokens = index, label, tokens
        self._noise_seed, self._seed = noise_seed, seed
        self._condition = condition
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Row numbers at positions first, ..., first + count - 1 of the endless shuffled stream."""
        position = np.arange(first, first + count)
        epoch, within = np.divmod(position, len(self))
        return np.array([self._order(int(e))[w] for e, w in zip(epoch, within, strict=True)])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._orders[epoch] = generator.permutation(len(self))
        return self._orders[epoch]

    def batch(
        self, first: int, count: int, code_width: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Condition]:
        """Noise float32 [B, L, E], tokens int64 [B, L], conditions [B] of stream positions."""
        rows = self.rows(first, count)
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64)).to(device)
        index = torch.from_numpy(self._index[rows]).to(device)
        noise_BLE = noise(self._noise_seed, index, (tokens.shape[1], code_width))
        if self._condition is not None:
            return noise_BLE, tokens, self._condition(rows)
        label = torch.from_numpy(self._label[rows].astype(np.int64)).to(device)
        return noise_BLE, tokens, label


def jump_stages(schedule: Sequence[int], first: int, count: int, device: torch.device) -> Tensor:
    """The t of every row, int64 [B]: the schedule's stages take turns along the stream."""
    positions = torch.arange(first, first + count, device=device)
    return torch.tensor(schedule, device=device)[positions % len(schedule)]


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
    """A student's parameters as an optimizer takes them: the layer that reads codes by itself.

    Its inputs are as small as the codes are (numbers of size 1 / sqrt(E) on the unit sphere), so
    its weights have to be large; at the common rate they would move too slowly. Adam with inputs
    scaled to size one is the same as a rate, and a reciprocal decay, that carry the factor.

    Returns:
        Groups with "lr_factor", for `set_learning_rate`.
    """
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
    network: nn.Module,
    batches: TrajectoryBatches,
    stages: tuple[int, ...],
    codebook_VE: Tensor,
    *,
    first: int,
    count: int,
    schedule: Sequence[int],
    logits_weight: float,
    code_weight: float,
) -> Losses:
    """Losses of the rows at stream positions first, ..., first + count - 1."""
    device = codebook_VE.device
    noise_BLE, tokens_BL, cond_B = batches.batch(first, count, codebook_VE.shape[1], device)
    return distillation_loss(
        network,
        stages,
        codebook_VE,
        noise_BLE,
        tokens_BL,
        cond_B,
        jump_stages(schedule, first, count, device),
        logits_weight=logits_weight,
        code_weight=code_weight,
    )

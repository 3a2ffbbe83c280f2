"""One step of a distillation, over any number of workers, in plain torch.

All workers agree before gradients move, so that none waits for one that cannot go on. What moves
weights is given: ddray.runtime.training.engine, or anything else with the operations of `Engine`.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.objective import Objective
from ddray.distillation.optimization import learning_rate
from ddray.distillation.stream import Batch


class Engine(Protocol):
    """What a step asks of the network in training and its optimizer."""

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro batch."""
        ...

    def step(self, rate: float, step: int) -> None:
        """After every micro batch: after the last one of a step, move weights and average."""
        ...

    def discard(self) -> None:
        """Forget the gradients of the micro batches since the last step."""
        ...


class Agreement:
    """What one worker has met, all know before any goes on.

    Args:
        world: number of workers.
        device: where collectives run.
    """

    def __init__(self, world: int, device: torch.device):
        self._world, self._device = world, device

    def __call__(self, *flags: bool) -> list[bool]:
        """Whether any worker has raised each flag; every worker must call."""
        if self._world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Average over all workers, in place; every worker must call."""
        if self._world == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / self._world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, values: Tensor) -> list[float]:
        """The mean over all workers; every worker must call."""
        if self._world > 1:
            torch.distributed.all_reduce(values)
        return (values / self._world).tolist()


class TrainingStep:
    """The step of a distillation.

    Args:
        engine: the network in training.
        objective: what is minimised.
        config: the job.
        agree: with the other workers.
        rank: of this worker.
        workers: of the run.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        config: DistillConfig,
        agree: Agreement,
        rank: int = 0,
        workers: int = 1,
    ):
        self._engine, self._objective = engine, objective
        self._config, self._agree = config, agree
        # Rows of a micro batch, and the slot of this worker's first one.
        self._rows = config.batch_size // workers // config.accumulation
        self._slot = rank * self._rows * config.accumulation

    def take(self, batch: Batch, step: int) -> tuple[dict[str, Tensor] | None, float]:
        """Move the weights once, or not at all where a loss is not finite on any worker.

        Args:
            batch: this worker's rows.
            step: steps done before.

        Returns:
            Figures to log, means over the micro batches, or None; and the last loss.
        """
        config = self._config
        rate = learning_rate(step, config.steps, config.lr, config.warmup, config.decay)
        figures: list[dict[str, Tensor]] = []
        for number, micro_batch in enumerate(batch.split(config.accumulation)):
            total, said = self._objective.loss(
                self._engine, micro_batch, step=step, row=self._slot + number * self._rows
            )
            loss = total.item()
            (bad,) = self._agree(not math.isfinite(loss))
            if bad:
                self._discard()
                return None, loss
            self._engine.backward(total)
            self._engine.step(rate, step)
            figures.append(said)
        for critic in self._objective.critics:
            critic.update(self._agree.average)
        means = {name: torch.stack([f[name] for f in figures]).mean() for name in figures[0]}
        return means, loss

    def _discard(self) -> None:
        self._engine.discard()
        for critic in self._objective.critics:
            critic.discard()


class Means:
    """Sums of the figures of steps, until they are logged."""

    def __init__(self) -> None:
        self.steps = 0
        self._names: list[str] = []
        self._sums = torch.zeros(())

    def add(self, figures: dict[str, Tensor]) -> None:
        """The figures of one step, the same ones at every step."""
        self._names = [*figures]
        values = torch.stack([*figures.values()])
        self._sums = self._sums.to(values) + values
        self.steps += 1

    def over(self, agree: Agreement) -> dict[str, float]:
        """The means over all steps and workers; every worker must call."""
        return dict(zip(self._names, agree.mean(self._sums / self.steps), strict=True))

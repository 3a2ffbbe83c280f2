"""What a training minimises, and of which network: one interface, and who offers it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ddray.config.distillation import DistillConfig
from ddray.distillation.critics import Critic, new_critics
from ddray.distillation.distilled import DistilledDecoding, code_precision
from ddray.distillation.masked import MaskedDecoding
from ddray.distillation.stream import Batch
from ddray.method.teacher import Teacher
from ddray.sets.trajectories.plan import TrajectoryPlan


class Objective(Protocol):
    """What the training loop asks of one.

    Attributes:
        critics: that learn beside the network.
    """

    critics: Sequence[Critic]

    def new_network(self) -> tuple[nn.Module, dict[str, Any]]:
        """What is trained, as it begins; and its future config.json, but for where it is from."""
        ...

    def loss(
        self, network: Callable[..., Any], batch: Batch, *, step: int, row: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, with gradient, and scalars to log, of a micro batch.

        Args:
            network: in training.
            batch: the rows.
            step: steps done before.
            row: place of the first of the rows in the batch of all workers: what is random about a
                row follows from step and place, whatever the number of workers.
        """
        ...


def new_objective(config: DistillConfig, teacher: Teacher, plan: TrajectoryPlan) -> Objective:
    """The one that a job asks for, the same on every worker.

    Args:
        config: the job, with its schedule.
        teacher: on the device of the training.
        plan: of the set.
    """
    if config.objective == "masked":
        return MaskedDecoding(config, teacher, plan.text_encoder)
    critics = new_critics(config, teacher, plan, code_precision(config, teacher))
    return DistilledDecoding(config, teacher, critics, plan.text_encoder)

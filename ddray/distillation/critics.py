"""What judges a student's whole sequences, beside the loss of its single tokens.

A critic takes the prediction that the distillation loss has made, gives the student one more loss,
and may learn from the prediction itself.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.adversary import Adversary
from ddray.distillation.losses import Prediction
from ddray.distillation.perceptual import Perceptual
from ddray.distillation.score_distillation import ScoreDistillation
from ddray.method.teacher import Teacher
from ddray.sets.trajectories.plan import TrajectoryPlan


class Critic(Protocol):
    """What the training loop asks of one."""

    def loss(self, prediction: Prediction, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss with gradient, and scalars to log."""
        ...

    def update(self, average: Callable[[Iterable[Tensor]], None]) -> None:
        """A step of its own, with gradients that `average` averages over the workers."""
        ...

    def discard(self) -> None:
        """Forget the gradients since its last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


def new_critics(
    config: DistillConfig, teacher: Teacher, plan: TrajectoryPlan, code_precision: float
) -> list[Critic]:
    """Those that a job asks for, the same on every worker.

    Args:
        config: the job.
        teacher: on the device of the training.
        plan: of the set, whose guidance and temperature the teacher judges with.
        code_precision: with which the student is going to be read.
    """
    critics: list[Critic] = []
    if config.score.weight:
        critics.append(
            ScoreDistillation(
                config,
                teacher,
                code_precision=code_precision,
                cfg=plan.cfg,
                temperature=plan.temperature,
            )
        )
    if config.adversary.weight:
        critics.append(Adversary(config, teacher, code_precision=code_precision))
    if config.perceptual.distance != "off":
        critics.append(Perceptual(config, teacher, code_precision=code_precision))
    return critics

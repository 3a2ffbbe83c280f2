"""The objective of a student: its loss at every jump, and what critics say of its sequences."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddray.config.distillation import DistillConfig
from ddray.distillation.critics import Critic
from ddray.distillation.losses import Losses, Prediction, judged
from ddray.distillation.optimization import (
    batch_loss,
    default_code_precision,
    is_compiled,
    jump_stages,
)
from ddray.distillation.stream import Batch
from ddray.method.student import given_tokens
from ddray.method.teacher import Teacher
from ddray.models.zoo import continue_student, new_student


def code_precision(config: DistillConfig, teacher: Teacher) -> float:
    """With which the student is going to be read."""
    if config.code_precision is None:
        return default_code_precision(teacher.stages)
    return config.code_precision


class DistilledDecoding:
    """A student of the teacher.

    Args:
        config: the job, with its schedule.
        teacher: stages and codebook are needed; to begin from, all of it.
        critics: that judge the student's whole sequences.
        text_encoder: of the set's captions; empty = the model's own.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        critics: Sequence[Critic] = (),
        text_encoder: str = "",
    ):
        assert config.schedule is not None  # the driver has put in the default
        self.critics = critics
        self._config, self._teacher, self._schedule = config, teacher, config.schedule
        self._text_encoder = text_encoder
        compiled = is_compiled(config, teacher.device)
        self._judge = torch.compile(judged, fullgraph=True) if compiled else judged

    def new_network(self) -> tuple[nn.Module, dict[str, Any]]:
        """The student, begun from the teacher or from another student."""
        init, encoder = self._config.init, self._text_encoder
        if init is None:
            network, card = new_student(self._teacher, encoder)
        else:
            network, card = continue_student(init, self._teacher, encoder)
        precision = code_precision(self._config, self._teacher)
        return network, {**card, "schedule": [*self._schedule], "code_precision": precision}

    def loss(
        self, network: Callable[..., Any], batch: Batch, *, step: int, row: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of tokens and codes, and those of the critics; see `Objective`."""
        config = self._config
        # A row takes another t at the next step: a lane of the data may always fill the same one.
        first = step + row
        losses = batch_loss(
            network,
            batch,
            self._teacher.stages,
            self._teacher.codebook,
            first=first,
            schedule=self._schedule,
            logits_weight=config.logits_weight,
            code_weight=config.code_weight,
            judge=self._judge,
        )
        total, figures = losses.total, self._figures(losses)
        judged = self._judged(losses.prediction, first) if self.critics else losses.prediction
        for critic in self.critics:
            loss, more = critic.loss(judged, 1 / config.accumulation)
            total, figures = total + loss, figures | more
        return total, {"loss": total.detach(), **figures}

    def _judged(self, prediction: Prediction, first: int) -> Prediction:
        """What critics may move: not the tokens of a jump that the next one keeps.

        Those are the first ones behind t. The cross entropy alone makes them nearly the teacher's
        own, and a critic would trade that for sequences that are safe to continue in this jump.
        """
        following = (*self._schedule[1:], self._schedule[-1])
        next_B = jump_stages(following, first, len(prediction.t_B), prediction.t_B.device)
        return prediction.detached(given_tokens(self._teacher.stages, next_B))

    def _figures(self, losses: Losses) -> dict[str, Tensor]:
        """What is logged of a batch; by t where every batch has rows of every t."""
        figures = {
            "cross_entropy": losses.cross_entropy,
            "code_error": losses.code_error,
            "token_accuracy": losses.token_accuracy,
        }
        t_B = losses.prediction.t_B
        if len(t_B) < len(self._schedule):
            return figures
        for t in self._schedule:
            here_B = t_B == t
            nats_B = losses.cross_entropy_B * here_B
            figures[f"cross_entropy_t{t}"] = nats_B.sum() / here_B.sum()
        return figures

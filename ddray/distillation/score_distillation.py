"""Beyond single tokens: the student's own sequences, judged by the teacher.

Plain Distilled Decoding asks for the teacher's token at every position, so a wrong token costs the
same whether its neighbours fit it or not. Here the sequence q that the student gives is read by two
autoregressive models at once: the teacher, and an imitator, which starts as a copy of the teacher
and keeps learning the student's sequences. Where the imitator finds a token likelier than the
teacher does, the student gives it too often. In one step per position,

    loss = mean_i sum_v student_i(v) (log p_imitator(v | q_<i) - log p_teacher(v | q_<i))

whose gradient is that of the divergence KL(student | teacher), position by position: the
categorical form of conditional score distillation ("Distilled Decoding 2", arXiv 2510.21003, where
the scores are of code embeddings) with the two models of DMD (arXiv 2311.18828). It needs no image,
no trajectory of its own and no sampling loop.

Shapes: B batch, L tokens, V codebook size.
"""

import copy

import torch
from torch import Tensor, nn

from ddray.config.distillation import DistillConfig
from ddray.distillation.learning_critic import LearningCritic
from ddray.distillation.losses import Prediction, computing_in, mean_where, token_nats
from ddray.method.guidance import likeliest
from ddray.method.student import token_scores
from ddray.method.teacher import Teacher


class ScoreDistillation(LearningCritic):
    """The imitator, its optimizer, and what both models say about a student's sequences.

    Args:
        config: the job; of it `score`, and what it shares with the student.
        teacher: on the device of the training.
        code_precision: with which the student is going to be read.
        cfg: guidance of the trajectories; None = none.
        temperature: of the trajectories.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        *,
        code_precision: float,
        cfg: float | None,
        temperature: float = 1.0,
    ):
        self._config, self._teacher = config, teacher
        self._precision, self._cfg, self._temperature = code_precision, cfg, temperature
        self.imitator: nn.Module = copy.deepcopy(teacher.model).float()
        self.imitator.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            self.imitator.parameters(),
            config.score.imitator_lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        super().__init__("imitator", self.imitator, optimizer, config.grad_clip)

    def loss(self, prediction: Prediction, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss; the imitator's own gradient is accumulated on the way.

        Args:
            prediction: both heads, as the distillation loss of this batch made them.
            share: of this batch in the imitator's step, where several make one.

        Returns:
            Scalar with gradient towards the student, weighted, 0 for the first `score.start` steps;
            and scalars to log: what the tokens of the student cost under teacher and imitator.
        """
        codebook_VE, asked_BL = self._teacher.codebook, prediction.asked_BL
        scores_BLV = token_scores(
            prediction.logits_BLV, prediction.codes_BLE.float(), codebook_VE, self._precision
        )
        own_BL = likeliest(scores_BLV.detach())
        tokens_BL = torch.where(asked_BL, own_BL, prediction.tokens_BL)
        with computing_in(self._config.precision, tokens_BL.device):
            theirs_BLV = self._teacher.forced_logits(prediction.cond, tokens_BL, self._cfg)
            imitated_BLV = self.imitator(prediction.cond, tokens_BL)
        theirs_BLV = (theirs_BLV.float() / self._temperature).log_softmax(-1)
        cost = mean_where(asked_BL, token_nats(imitated_BLV, tokens_BL))
        (share * cost).backward()
        excess_BLV = imitated_BLV.detach().float().log_softmax(-1) - theirs_BLV
        loss = mean_where(asked_BL, (scores_BLV.softmax(-1) * excess_BLV).sum(-1))
        # Until the imitator knows the student, the two models agree and say nothing.
        weight = self._config.score.weight if self.step >= self._config.score.start else 0.0
        return weight * loss, {
            "teacher_nats": mean_where(asked_BL, token_nats(theirs_BLV, tokens_BL)),
            "imitator_nats": cost.detach(),
            "score": loss.detach(),
        }

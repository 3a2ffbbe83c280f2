"""Adversarial distillation in the tokenizer's latent: a discriminator beside the teacher's tokens.

The discriminator tells decoder inputs of trajectories from those of the student (Goodfellow et al.,
arXiv 1406.2661, non-saturating; class by projection, arXiv 1802.05637; zero-centred penalty on the
gradient at real samples, arXiv 1801.04406). The latent is where adversarial latent distillation
(arXiv 2403.12015) judges too: small, and no image is decoded. Tokens enter by straight-through: the
code of the token that inference reads, with the gradient of the expected code.

Shapes: B batch, L tokens, V codebook size, E code width, C discriminator width, P cells along a
side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.config.distillation import DistillConfig
from ddray.distillation.learning_critic import LearningCritic
from ddray.distillation.losses import Prediction
from ddray.method.conditioning import Condition
from ddray.method.guidance import likeliest
from ddray.method.student import token_scores
from ddray.method.teacher import Teacher


def straight_through(scores_BLV: Tensor, codebook_VE: Tensor) -> Tensor:
    """Codes of the likeliest tokens, float32 [B, L, E]; gradients are those of the mean code."""
    mean_BLE = scores_BLV.softmax(-1) @ codebook_VE
    return codebook_VE[likeliest(scores_BLV)] + mean_BLE - mean_BLE.detach()


def sequence_codes(
    prediction: Prediction, codebook_VE: Tensor, code_precision: float
) -> tuple[Tensor, Tensor]:
    """A student's whole sequences as codes, and the teacher's.

    Args:
        prediction: both heads, as the distillation loss of a batch made them.
        codebook_VE: float32.
        code_precision: with which the student is going to be read.

    Returns:
        float32 [B, L, E] each: by straight-through where tokens were asked for, data elsewhere; and
        the data.
    """
    scores_BLV = token_scores(
        prediction.logits_BLV, prediction.codes_BLE.float(), codebook_VE, code_precision
    )
    theirs_BLE = codebook_VE[prediction.tokens_BL]
    own_BLE = straight_through(scores_BLV, codebook_VE)
    return torch.where(prediction.asked_BL[..., None], own_BLE, theirs_BLE), theirs_BLE


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCPP: Tensor) -> Tensor:
        out: Tensor = x_BCPP + self.second(F.silu(self.first(F.silu(x_BCPP))))
        return out


class Discriminator(nn.Module):
    """Logit that a latent is the teacher's. It has no norm layer: samples must not see each other.

    Args:
        code_width: E.
        side: P.
        num_classes: of the condition; 0 = judge without one.
        width: C.
        blocks: residual blocks.
    """

    def __init__(self, code_width: int, side: int, num_classes: int, width: int, blocks: int = 3):
        super().__init__()
        self.enter = nn.Conv2d(code_width, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(width, side, side))
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.judge = nn.Linear(width, 1)
        # All latents look the same to it at first.
        nn.init.zeros_(self.judge.weight)
        nn.init.zeros_(self.judge.bias)
        self.by_class = nn.Embedding(num_classes + 1, 2 * width) if num_classes else None
        if self.by_class is not None:
            nn.init.zeros_(self.by_class.weight)

    def forward(self, latent_BEPP: Tensor, cond: Condition) -> Tensor:
        """Logits [B] of latents of about size one."""
        x_BCPP = self.enter(latent_BEPP) + self.place
        projection_BC = None
        if self.by_class is not None and isinstance(cond, Tensor):
            shift_BC, projection_BC = self.by_class(cond).chunk(2, -1)
            x_BCPP = x_BCPP + shift_BC[..., None, None]
        mean_BC = F.silu(self.blocks(x_BCPP)).mean((2, 3))
        logit_B: Tensor = self.judge(mean_BC)[:, 0]
        if projection_BC is not None:
            logit_B = logit_B + (projection_BC * mean_BC).sum(-1)
        return logit_B


class Adversary(LearningCritic):
    """The discriminator, its optimizer, and both sides' losses.

    Args:
        config: the job; of it `adversary`.
        teacher: on the device of the training.
        code_precision: with which the student is going to be read.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, *, code_precision: float):
        self._config, self._codebook, self._precision = config, teacher.codebook, code_precision
        self._latent = teacher.tokenizer.module.decoder_input
        with torch.no_grad():
            tokens = torch.randint(
                len(self._codebook), (64, teacher.num_tokens), device=teacher.device
            )
            example = self._latent(self._codebook[tokens])
        self._unit = example.square().mean().sqrt()
        num_classes = teacher.num_classes if teacher.conditioning == "class" else 0
        shape = (example.shape[1], example.shape[2], num_classes, config.adversary.width)
        self.discriminator = Discriminator(*shape).to(teacher.device)
        optimizer = torch.optim.Adam(
            self.discriminator.parameters(), config.adversary.lr, betas=(0.5, 0.95), fused=True
        )
        super().__init__("discriminator", self.discriminator, optimizer)

    def loss(self, prediction: Prediction, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss; the discriminator's own gradient is accumulated on the way.

        Args:
            prediction: both heads, as the distillation loss of this batch made them.
            share: of this batch in the discriminator's step, where several make one.

        Returns:
            Scalar with gradient towards the student, weighted, 0 for the first `adversary.start`
            steps; and scalars to log.
        """
        own_BLE, theirs_BLE = sequence_codes(prediction, self._codebook, self._precision)
        real, fake = (self._latent(codes) / self._unit for codes in (theirs_BLE, own_BLE))
        self.discriminator.requires_grad_(False)
        loss = F.softplus(-self.discriminator(fake, prediction.cond)).mean()
        self.discriminator.requires_grad_(True)
        weight = self._config.adversary.weight if self.step >= self._config.adversary.start else 0.0
        return weight * loss, {
            "adversary": loss.detach(),
            **self._judge(real, fake.detach(), prediction.cond, share),
        }

    def _judge(
        self, real: Tensor, fake: Tensor, cond: Condition, share: float
    ) -> dict[str, Tensor]:
        """The discriminator's loss with the penalty on its slope at real samples; backward."""
        real = real.detach().requires_grad_(True)
        real_B, fake_B = self.discriminator(real, cond), self.discriminator(fake, cond)
        cost = F.softplus(-real_B).mean() + F.softplus(fake_B).mean()
        (slope,) = torch.autograd.grad(real_B.sum(), real, create_graph=True)
        penalty = slope.square().sum((1, 2, 3)).mean()
        (share * (cost + self._config.adversary.penalty / 2 * penalty)).backward()
        right = ((real_B > 0).float().mean() + (fake_B < 0).float().mean()) / 2
        return {"discriminator": cost.detach(), "discriminator_accuracy": right}

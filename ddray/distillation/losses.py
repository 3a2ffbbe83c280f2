"""What the student learns: the teacher's tokens behind t, from X_t, as logits and as codes.

Liu et al., "Distilled Decoding" (arXiv 2412.17153), section 3.3 and appendix. Plain torch: one call
is the whole forward half of a training step.

Shapes: B batch, L tokens, V codebook size, E code width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import ConfigError
from ddray.method.conditioning import Condition
from ddray.method.guidance import likeliest
from ddray.method.student import given_tokens, keep_data


class Prediction(NamedTuple):
    """What a student said about a batch, for losses beyond the tokens' own.

    Attributes:
        logits_BLV: of the logits head.
        codes_BLE: of the code head.
        tokens_BL: int64, the teacher's.
        asked_BL: bool, the tokens behind t; the others were data.
        cond: classes or captions [B].
        t_B: int64.
    """

    logits_BLV: Tensor
    codes_BLE: Tensor
    tokens_BL: Tensor
    asked_BL: Tensor
    cond: Condition
    t_B: Tensor

    def detached(self, where_BL: Tensor) -> "Prediction":
        """The same, without gradient at some tokens."""
        where_BL1 = where_BL[..., None]
        return self._replace(
            logits_BLV=torch.where(where_BL1, self.logits_BLV.detach(), self.logits_BLV),
            codes_BLE=torch.where(where_BL1, self.codes_BLE.detach(), self.codes_BLE),
        )


class Losses(NamedTuple):
    """Scalars, averaged over the tokens that the student had to predict.

    Attributes:
        total: what is minimised.
        cross_entropy: of the logits head against the teacher's tokens, in nats.
        code_error: mean squared error of the code head, per number.
        token_accuracy: share of tokens whose argmax is the teacher's.
        cross_entropy_B: the same for each row of the batch.
        prediction: of the student, with gradient.
    """

    total: Tensor
    cross_entropy: Tensor
    code_error: Tensor
    token_accuracy: Tensor
    cross_entropy_B: Tensor
    prediction: Prediction


Judge = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def distillation_loss(
    student: Callable[..., tuple[Tensor, Tensor]],
    stages: tuple[int, ...],
    codebook_VE: Tensor,
    noise_BLE: Tensor,
    tokens_BL: Tensor,
    cond_B: Condition,
    t_B: Tensor,
    *,
    logits_weight: float = 1.0,
    code_weight: float = 1.0,
    judge: Judge | None = None,
) -> Losses:
    """Loss of a batch of trajectories at the given t.

    Args:
        student: (X_t [B, L, E], cond [B], t [B]) -> logits [B, L, V], codes [B, L, E].
        stages: token counts per stage.
        codebook_VE: float32 [V, E].
        noise_BLE: float32 [B, L, E], where the trajectories start.
        tokens_BL: int64 [B, L], where they end.
        cond_B: int64 class ids [B] or captions.
        t_B: int64 [B], stages that are data.
        logits_weight: weight of the cross entropy.
        code_weight: weight of the squared error, which is divided by the codes' mean square so that
            it has the same meaning for every codebook.
        judge: `judged`, or what a compiler makes of it; None = the former.

    Returns:
        Scalars with gradient in `total`, and the prediction they are of.
    """
    codes_BLE = codebook_VE[tokens_BL]
    given_BL = given_tokens(stages, t_B)
    logits_BLV, predicted_BLE = student(keep_data(codes_BLE, noise_BLE, given_BL), cond_B, t_B)
    asked_BL = ~given_BL
    # On a GPU the host would wait for the answer; there the loss is NaN instead.
    if asked_BL.device.type == "cpu" and not bool(asked_BL.any()):
        raise ConfigError("every t is the number of stages: nothing is left to predict")
    weights = (logits_weight, code_weight / codebook_VE.square().mean())
    scores = (judge or judged)(logits_BLV, predicted_BLE, codes_BLE, tokens_BL, asked_BL, *weights)
    prediction = Prediction(logits_BLV, predicted_BLE, tokens_BL, asked_BL, cond_B, t_B)
    return Losses(*scores, prediction)


def judged(
    logits_BLV: Tensor,
    predicted_BLE: Tensor,
    codes_BLE: Tensor,
    tokens_BL: Tensor,
    asked_BL: Tensor,
    logits_weight: float,
    code_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both heads against tokens and codes: the first five of `Losses`.

    Args:
        logits_BLV: of the logits head.
        predicted_BLE: of the code head.
        codes_BLE: the teacher's.
        tokens_BL: int64, the teacher's.
        asked_BL: bool, the tokens that are judged.
        logits_weight: weight of the cross entropy.
        code_weight: weight of the squared error, a scalar.
    """
    # Masked, not picked: how many tokens a mask picks is a number that a GPU's host waits for.
    nats_BL = token_nats(logits_BLV, tokens_BL)
    cross_entropy = mean_where(asked_BL, nats_BL)
    square_BL = (predicted_BLE.float() - codes_BLE).square().mean(-1)
    code_error = mean_where(asked_BL, square_BL)
    right_BL = likeliest(logits_BLV.detach()) == tokens_BL
    return (
        logits_weight * cross_entropy + code_error * code_weight,
        cross_entropy.detach(),
        code_error.detach(),
        mean_where(asked_BL, right_BL),
        torch.where(asked_BL, nats_BL.detach(), 0).sum(1) / asked_BL.sum(1),
    )


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Within, a critic's networks compute in bfloat16 where the student does.

    Not in float16: a critic's own gradients have no loss scale, and would vanish.
    """
    if precision != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def token_nats(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Cross entropy of each token, float32 [B, L]."""
    nats = F.cross_entropy(logits_BLV.float().flatten(0, 1), tokens_BL.flatten(), reduction="none")
    return nats.view_as(tokens_BL)


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values at which the mask, of their shape, is true; NaN where it nowhere is."""
    return torch.where(mask, values.float(), 0).sum() / mask.sum()

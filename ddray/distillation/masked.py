"""The objective of masked decoding: tokens of the teacher, some masked, are to be filled in.

Chang et al., "MaskGIT: masked generative image transformer" (arXiv 2202.04200), section 3.1. Of a
trajectory the tokens and the condition alone are read, and no noise.

Shapes: B batch, L tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.critics import Critic
from ddray.distillation.losses import mean_where
from ddray.distillation.stream import Batch
from ddray.method.conditioning import choose
from ddray.method.guidance import likeliest
from ddray.method.seeding import MASK_STREAM, uniforms
from ddray.method.teacher import Teacher
from ddray.models.masked import MaskedTransformer
from ddray.models.zoo import new_masked

# What a cosine schedule masks of the tokens, on average over its steps.
_MEAN_SHARE = 2 / math.pi


def cosine_masks(uniform_BL: Tensor, uniform_B: Tensor) -> Tensor:
    """Masks of a share of the tokens that has the distribution of cos(pi u / 2), bool [B, L].

    Args:
        uniform_BL: those of a row that have the least are masked; at least one.
        uniform_B: u, of the share.
    """
    length = uniform_BL.shape[1]
    count_B = (length * torch.cos(uniform_B * (math.pi / 2))).round().clamp(min=1)
    return uniform_BL.argsort(1).argsort(1) < count_B[:, None]


class MaskedDecoding:
    """A network that fills masked tokens in.

    The mask of a row, and whether its condition is dropped, follow from seed, step and the row's
    place in the batch of all workers.

    Args:
        config: the job.
        teacher: sizes and tokenizer are needed.
        text_encoder: of the set's captions; empty = the teacher's own.
    """

    critics: Sequence[Critic] = ()

    def __init__(self, config: DistillConfig, teacher: Teacher, text_encoder: str = ""):
        self._config, self._teacher, self._text_encoder = config, teacher, text_encoder

    def new_network(self) -> tuple[MaskedTransformer, dict[str, Any]]:
        """The network, with random weights."""
        return new_masked(self._teacher, self._text_encoder)

    def loss(
        self, network: Callable[..., Any], batch: Batch, *, step: int, row: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Smoothed cross entropy of masked tokens, and scalars to log; see `Objective`.

        The sum over masked tokens is divided by how many there are on average: by those of a batch,
        two workers would learn something else than one.
        """
        told, tokens_BL, model = self._config.masked, batch.tokens_BL, self._teacher.model
        rows, length = tokens_BL.shape
        first = step * self._config.batch_size + row
        index_B = torch.arange(first, first + rows, device=tokens_BL.device)
        uniform = uniforms(self._config.seed, index_B, length + 2, MASK_STREAM)
        mask_BL = cosine_masks(uniform[:, 2:], uniform[:, 0])
        cond = batch.cond_B
        if told.cond_dropout:
            # The teacher's null condition is the network's: classes and captions are the same.
            cond = choose(uniform[:, 1] < told.cond_dropout, model.null(cond), cond)
        vocabulary = model.config.vocab_size
        logits_BLV = network(tokens_BL.masked_fill(mask_BL, vocabulary), cond).float()
        log_p_BLV = F.log_softmax(logits_BLV, -1)
        nats_BL = -log_p_BLV.gather(-1, tokens_BL[..., None])[..., 0]
        smoothed_BL = torch.lerp(nats_BL, -log_p_BLV.mean(-1), told.label_smoothing)
        total = (smoothed_BL * mask_BL).sum() / (rows * length * _MEAN_SHARE)
        right_BL = likeliest(logits_BLV.detach()) == tokens_BL
        return total, {
            "loss": total.detach(),
            "cross_entropy": mean_where(mask_BL, nats_BL.detach()),
            "token_accuracy": mean_where(mask_BL, right_BL),
        }

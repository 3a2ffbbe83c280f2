"""Masked decoding, a baseline: all tokens are masked at first, and a few passes fill them in.

Chang et al., "MaskGIT: masked generative image transformer" (arXiv 2202.04200), section 3.2. Of the
tokens that are drawn in a pass, those that the network finds likeliest stay; the others are masked
again.

Shapes: B batch, L all tokens, V codebook size, K passes.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ddray.errors import ConfigError, is_finite, is_integer
from ddray.method.conditioning import Condition, as_tensors, concatenate, from_tensors
from ddray.method.guidance import classifier_free_guidance, draw
from ddray.method.model import Model
from ddray.method.seeding import MASKED_STREAM, uniforms
from ddray.method.teacher import AskedFor


def masked_after(tokens: int, steps: int) -> list[int]:
    """How many tokens are masked after each pass: a cosine that falls from all to none.

    Every pass fixes one token at least.

    Args:
        tokens: L.
        steps: K, at most L.
    """
    counts: list[int] = []
    for step in range(1, steps + 1):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / steps) + 1e-9)
        before = counts[-1] if counts else tokens
        counts.append(max(steps - step, min(before - 1, wanted)))
    return counts


def default_temperature(steps: int) -> float:
    """What served the digits best: the more tokens are drawn at once, the safer each has to be."""
    return min(1.0, 0.4 * math.sqrt(steps))


class Masked(Model):
    """A network that fills masked tokens in."""

    @property
    def default_cfg(self) -> float:
        """Recommended guidance; none where nothing is recommended."""
        return float(self.config.get("default_cfg", self.model.no_guidance))

    @torch.no_grad()
    def guided_logits(
        self, cond_B: AskedFor, tokens_BL: Tensor, cfg: float | None = None
    ) -> Tensor:
        """Logits of all tokens where none is masked, float32 [B, L, V]; see `Teacher`."""
        cond = self.condition(cond_B)
        return self._logits(cfg, self._tokens(tokens_BL, len(cond)), *as_tensors(cond))[0]

    @torch.no_grad()
    def generate(
        self,
        cond_B: AskedFor,
        *,
        steps: int,
        seed: int = 0,
        index: Sequence[int] | Tensor | None = None,
        cfg: float | None = None,
        temperature: float | None = None,
        choice_temperature: float = 4.5,
    ) -> Tensor:
        """Tokens of images in so many passes of the network.

        Args:
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            steps: passes K, from 1 to L; guidance doubles the work of each.
            seed: together with `index` decides every draw.
            index: sample indices [B]; None = 0..B-1.
            cfg: guidance, null + cfg (conditional - null); None or 1 = off.
            temperature: divides the logits that tokens are drawn from; 0 = the likeliest, None =
                `default_temperature`; the paper's is 1.
            choice_temperature: of the Gumbel noise on the confidence by which tokens stay, at the
                beginning; it falls to 0 linearly.

        Returns:
            int64 tokens [B, L].

        Raises:
            ConfigError: for settings out of range, or logits that are not finite.
        """
        self._check(steps, cfg, temperature, choice_temperature)
        if temperature is None:
            temperature = default_temperature(steps)
        cond = self.condition(cond_B)
        index_B = self._index(index, len(cond))
        length, mask_id = self.num_tokens, self.model.mask_id
        drawn = uniforms(seed, index_B, 2 * length * steps, MASKED_STREAM)
        uniform_KBL, noise_KBL = drawn.view(len(cond), steps, 2, length).permute(2, 1, 0, 3)
        tokens_BL = torch.full_like(index_B[:, None], mask_id).repeat(1, length)
        finite = []
        for step, left in enumerate(masked_after(length, steps)):
            (logits_BLV,) = self.replayed(
                ("masked", cfg), partial(self._logits, cfg), tokens_BL, *as_tensors(cond)
            )
            finite.append(logits_BLV.amax(-1).isfinite().all())
            scaled_BLV = logits_BLV / max(temperature, 1e-5)
            was_masked_BL = tokens_BL == mask_id
            tokens_BL = torch.where(was_masked_BL, draw(scaled_BLV, uniform_KBL[step]), tokens_BL)
            if left:
                warmth = choice_temperature * (1 - (step + 1) / steps)
                confidence_BL = _confidence(logits_BLV, tokens_BL, noise_KBL[step], warmth)
                confidence_BL = confidence_BL.masked_fill(~was_masked_BL, math.inf)
                again_Bl = confidence_BL.topk(left, largest=False).indices
                tokens_BL = tokens_BL.scatter(1, again_Bl, mask_id)
        if not bool(torch.stack(finite).all()):
            raise ConfigError(f"{self.name} gives logits that are not finite; use another dtype")
        return tokens_BL

    def _logits(self, cfg: float | None, tokens_BL: Tensor, *parts: Tensor) -> tuple[Tensor]:
        """Guided logits, float32 [B, L, V]."""
        cond: Condition = from_tensors(parts)
        if cfg is None or cfg == 1:
            return (self.model(tokens_BL, cond).float(),)
        both = concatenate(cond, self.model.null(cond))
        conditional, null = self.model(tokens_BL.repeat(2, 1), both).float().chunk(2)
        return (classifier_free_guidance(conditional, null, cfg),)

    def _check(
        self, steps: int, cfg: float | None, temperature: float | None, choice_temperature: float
    ) -> None:
        if not is_integer(steps) or not 1 <= steps <= self.num_tokens:
            raise ConfigError(
                f"steps={steps!r} must be an integer from 1 to {self.num_tokens}, the number of "
                "tokens"
            )
        if cfg is not None and not is_finite(cfg):
            raise ConfigError(f"cfg={cfg!r} is no guidance; give a finite number, or None for none")
        for name, value in (
            ("temperature", temperature),
            ("choice_temperature", choice_temperature),
        ):
            if value is not None and (not is_finite(value) or value < 0):
                raise ConfigError(f"{name}={value!r} must be a number >= 0")


def _confidence(logits_BLV: Tensor, tokens_BL: Tensor, uniform_BL: Tensor, warmth: float) -> Tensor:
    """Log-probability of the tokens, and Gumbel noise times `warmth`; float64 [B, L]."""
    logits_BLV = logits_BLV.double()
    chosen_BL = logits_BLV.gather(-1, tokens_BL[..., None])[..., 0] - logits_BLV.logsumexp(-1)
    return chosen_BL - warmth * (-uniform_BL.log()).log()

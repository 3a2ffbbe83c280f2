"""The distilled network: from a noise sequence to all tokens in one jump, or a few.

Where a schedule says so, the teacher writes some stages in between (`ddray.method.schedule`).

Shapes: B batch, L all tokens, l tokens of this stage, V codebook size, E code width.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ddray.errors import ConfigError, is_finite, is_integer
from ddray.method.conditioning import Condition, as_tensors, from_tensors
from ddray.method.guidance import check_filters, likeliest
from ddray.method.model import Model
from ddray.method.schedule import TeacherStages, parse_schedule
from ddray.method.seeding import standard_normal
from ddray.method.teacher import SAMPLING, AskedFor, Teacher, refuse_unknown

_READ_ELEMENTS = 2**22


def keep_data(data_BLE: Tensor, noise_BLE: Tensor, given_BL: Tensor) -> Tensor:
    """X_t: data where a token is given, noise behind (arXiv 2412.17153, section 3.3); [B, L, E]."""
    return torch.where(given_BL[..., None], data_BLE, noise_BLE)


def given_tokens(stages: Sequence[int], t_B: Tensor) -> Tensor:
    """Which tokens lie in the first t stages, bool [B, L]."""
    return stage_of_tokens(tuple(stages), t_B.device)[None] < t_B[:, None]


@cache  # and kept: CUDA graphs read it where it lies
def stage_of_tokens(stages: tuple[int, ...], device: torch.device) -> Tensor:
    """The stage that each token is fixed in, int64 [L]; made once for a device."""
    # First asked for inside somebody's inference mode, it must also serve a later training.
    with torch.inference_mode(False):
        return torch.tensor(
            [k for k, size in enumerate(stages) for _ in range(size)], device=device
        )


def token_scores(
    logits_BlV: Tensor, codes_BlE: Tensor, codebook_VE: Tensor, code_precision: float
) -> Tensor:
    """Log-probabilities of tokens under both heads, up to a constant: what a student is read by.

    Args:
        logits_BlV: of the logits head.
        codes_BlE: of the code head, float32.
        codebook_VE: float32.
        code_precision: see `Student`.

    Returns:
        float32 [B, l, V]; the argmax is the token.
    """
    logits_BlV = logits_BlV.float()
    if code_precision == 0:
        return logits_BlV
    squared_V = codebook_VE.square().sum(1)
    # -|c - x|^2 / 2, without the term that is the same for every code c.
    closeness = codes_BlE @ codebook_VE.T - squared_V / 2
    return logits_BlV + code_precision / squared_V.mean() * closeness


class Student(Model):
    """A network that jumps from X_t to all tokens at once.

    Attributes:
        config: what `config.json` holds; "schedule" lists the stages at which it learnt to jump.
        code_precision: how much the code head has to say when a token is read: the token maximises
            the product of the logits head's distribution and of a normal distribution around the
            regressed code, whose precision this is, in units of 1 / (mean square norm of a code).
            0, the default, is the logits head alone, as published.
    """

    @cached_property
    def code_precision(self) -> float:
        """Weight of the code head in reading tokens."""
        value = self.config.get("code_precision", 0.0)
        if not is_finite(value) or value < 0:
            raise ConfigError(f"{self.name}: code_precision={value!r} must be a number >= 0")
        return float(value)

    @torch.no_grad()
    def predict(self, x_BLE: Tensor, cond_B: AskedFor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads for one X_t.

        Args:
            x_BLE: float [B, L, E], codes of the first t stages, noise behind them.
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            t_B: number of leading stages that are data [B].

        Returns:
            float32 logits [B, L, V] and codes [B, L, E].
        """
        cond = self.condition(cond_B)
        x_BLE = self._codes_or_noise(x_BLE, len(cond), "x")
        t_B = torch.as_tensor(t_B, device=self.device)
        if t_B.shape != (len(cond),) or bool(((t_B < 0) | (t_B > len(self.stages))).any()):
            raise ConfigError(f"t must hold {len(cond)} numbers from 0 to {len(self.stages)}")
        logits_BLV, codes_BLE = self.model(x_BLE, cond, t_B)
        return logits_BLV.float(), codes_BLE

    @torch.no_grad()
    def generate(
        self,
        cond_B: AskedFor,
        *,
        noise: Tensor | None = None,
        index: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        schedule: Sequence[int] | str = (0,),
        split: int | None = None,
        teacher: Teacher | None = None,
        **teacher_sampling: Any,
    ) -> Tensor:
        """Images' codes in one jump per entry of the schedule.

        Args:
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            noise: float [B, L, E]; None = `noise(seed, index)`.
            index: sample indices [B]; None = 0..B-1.
            seed: run seed.
            schedule: stages at which to jump, such as (0,), "0,16" or "0,teacher:8-16,16".
            split: leading stages whose tokens are read (argmax of the logits head, see
                `code_precision`), the rest from the code head; None = the config's value, or all.
            teacher: needed for the teacher's parts of a schedule.
            **teacher_sampling: cfg, top_k, ... of those parts, as in `Teacher.sample`; for VAR also
                unmasked_prefix, see `VARDecoder`.

        Returns:
            float32 codes [B, L, E].

        Raises:
            ConfigError: for a schedule beyond the stages, noise of another shape, or a missing
                teacher.
        """
        cond = self.condition(cond_B)
        steps = parse_schedule(schedule, len(self.stages))
        refuse_unknown(teacher_sampling, SAMPLING)
        involved = any(isinstance(step, TeacherStages) for step in steps)
        if involved and teacher is None:
            raise ConfigError(f"schedule {schedule!r} has a teacher's part; give teacher=")
        if involved and teacher is not None:
            self._check_teacher(teacher, teacher_sampling)
        if teacher_sampling and not involved:
            warnings.warn(
                f"{', '.join(teacher_sampling)} has no effect: schedule {schedule!r} has no part "
                "of the teacher",
                stacklevel=2,
            )
        index_B = self._index(index, len(cond))
        noise_BLE = self._noise(noise, seed, index_B)
        cut = self.stage_starts()[self._split(split)]
        x_BLE = noise_BLE
        for step in steps:
            if isinstance(step, TeacherStages):
                assert teacher is not None
                x_BLE = self._let_teacher_continue(
                    teacher, step, x_BLE, cond, seed=seed, index=index_B, **teacher_sampling
                )
            else:
                jump = partial(self._jump, step, cut)
                given = x_BLE, noise_BLE, *as_tensors(cond)
                (x_BLE,) = self.replayed(("jump", step, cut), jump, *given)
        return x_BLE

    def _jump(
        self, t: int, cut: int, x_BLE: Tensor, noise_BLE: Tensor, *parts: Tensor
    ) -> tuple[Tensor]:
        """Keep the first t stages of x, fill X_t up with the noise, predict everything behind t."""
        cond = from_tensors(parts)
        t_B = torch.full((len(cond),), t, device=self.device)
        given_BL = given_tokens(self.stages, t_B)
        x_BLE = keep_data(x_BLE, noise_BLE, given_BL)
        logits_BLV, codes_BLE = self.model(x_BLE, cond, t_B)
        tokens = self._read(logits_BLV[:, :cut], codes_BLE[:, :cut])
        if t:
            nearest = self.tokenizer.module.nearest(x_BLE[:, :cut])
            tokens = torch.where(given_BL[:, :cut], nearest, tokens)
        behind = keep_data(x_BLE, codes_BLE, given_BL)[:, cut:]
        return (torch.cat((self.codebook[tokens], behind), 1),)

    def _read(self, logits_BlV: Tensor, codes_BlE: Tensor) -> Tensor:
        """Most likely tokens int64 [B, l] under both heads, as `code_precision` weighs them."""
        if self.code_precision == 0:
            return likeliest(logits_BlV)
        # A few images at once: float32 logits of a whole batch would be its largest tensor by far.
        rows = max(1, _READ_ELEMENTS // max(1, logits_BlV[0].numel()))
        parts = zip(logits_BlV.split(rows), codes_BlE.split(rows), strict=True)
        return torch.cat([self._most_likely(*part) for part in parts])

    def _most_likely(self, logits_BlV: Tensor, codes_BlE: Tensor) -> Tensor:
        scores = token_scores(logits_BlV, codes_BlE, self.codebook, self.code_precision)
        return likeliest(scores)

    def _let_teacher_continue(
        self, teacher: Teacher, part: TeacherStages, x_BLE: Tensor, cond: Condition, **sampling: Any
    ) -> Tensor:
        """Snap the first stages to tokens and let the teacher write the next ones."""
        starts = self.stage_starts()
        prefix = teacher.tokenizer.module.nearest(x_BLE[:, : starts[part.first]])
        tokens = teacher.continue_from(cond, prefix, part.last, **sampling)
        return torch.cat((teacher.codebook[tokens], x_BLE[:, starts[part.last] :]), 1)

    def _noise(self, given: Tensor | None, seed: int, index_B: Tensor) -> Tensor:
        if given is None:
            shape = (self.num_tokens, self.model.config.codebook_dim)
            return standard_normal(seed, index_B, shape)
        return self._codes_or_noise(given, len(index_B), "noise")

    def _codes_or_noise(self, given: Tensor, batch: int, what: str) -> Tensor:
        """float32 [B, L, E] on the device, refused when it is not."""
        shape = (batch, self.num_tokens, self.model.config.codebook_dim)
        given = torch.as_tensor(given, device=self.device)
        if given.shape != shape:
            raise ConfigError(f"{what} is {[*given.shape]}, expected {[*shape]}")
        return given.float()

    def _check_teacher(self, teacher: Teacher, sampling: Mapping[str, Any]) -> None:
        """Refuse a teacher of other tokens or conditions, and settings it cannot sample with."""
        settings = {**SAMPLING, **sampling}
        check_filters(*(settings[name] for name in ("temperature", "top_k", "top_p")))
        teacher.guides(settings["cfg"])
        if settings["unmasked_prefix"] and not hasattr(teacher.model, "quantizer"):
            raise ConfigError("unmasked_prefix is a quirk of VAR's published code alone")
        for what, mine, theirs in (
            ("conditioning", self.conditioning, teacher.conditioning),
            ("number of classes", self.num_classes, teacher.num_classes),
            ("stages", self.stages, teacher.stages),
            ("device", self.device, teacher.device),
            ("tokenizer", self.tokenizer.fingerprint, teacher.tokenizer.fingerprint),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"the teacher does not fit the student: its {what} differs ({theirs}, the "
                    f"student has {mine})"
                )

    def _split(self, split: int | None) -> int:
        if split is None:
            split = int(self.config.get("split", len(self.stages)))
        if not is_integer(split) or not 0 <= split <= len(self.stages):
            raise ConfigError(f"split={split!r} is outside 0 to {len(self.stages)} stages")
        return int(split)

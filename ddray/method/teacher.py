"""A trained autoregressive model: the distribution that is distilled.

A teacher fixes a sequence stage by stage: from fresh random numbers (`Teacher.sample`) or,
deterministically, from a noise sequence (`Teacher.trajectories`).

Shapes: B batch, L all tokens, l tokens of this stage, P tokens of a prefix, V codebook size, E code
width.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddray.errors import ConfigError, is_finite, is_integer
from ddray.method.conditioning import Condition, as_tensors, concatenate, from_tensors
from ddray.method.flow import Transport
from ddray.method.guidance import check_filters, draw, filter_logits
from ddray.method.model import Model
from ddray.method.seeding import standard_normal, uniforms

AskedFor = Sequence[int] | Sequence[str] | Tensor | tuple[Tensor, Tensor]
"""Class ids [B]; or captions: texts, or features float [B, T, D] and mask [B, T], right-padded."""


SAMPLING = {
    "cfg": None,
    "cfg_interval": -1,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "unmasked_prefix": False,
}
"""Settings of a teacher's part of a schedule, with their defaults: all of them off."""


Choice = Callable[[Tensor, Tensor], Tensor]
"""Tokens int64 [B, l] of filtered logits [B, l, V] and of the random numbers of the same tokens:
uniform [B, l] or normal [B, l, E]."""


@dataclass(frozen=True)
class Rules:
    """How a distribution is made of a teacher's logits; `Teacher.sample` says what each means."""

    cfg: float | None
    cfg_interval: int
    top_k: int
    top_p: float
    temperature: float
    unmasked_prefix: bool = False
    skip: int = 0


@dataclass(frozen=True)
class _Carry:
    """The choice that the transport makes of normal noise."""

    solve: Transport

    def __call__(self, logits_BlV: Tensor, noise_BlE: Tensor) -> Tensor:
        tokens_N = self.solve(noise_BlE.flatten(0, 1), logits_BlV.flatten(0, 1))
        return tokens_N.unflatten(0, logits_BlV.shape[:2])


class Decoder(Protocol):
    """One batch on its way through the stages of a teacher."""

    def logits(self, stages: int = 1) -> Tensor:
        """Logits of the next stage, or of several at once, float32 [B, l, V].

        Of several, those of the first see the stages before; the others see no token of one
        another, and a family says what stands in the places of those.
        """

    def append(self, tokens_Bl: Tensor) -> None:
        """Fix the tokens of that stage, int64 [B, l]; under guidance they serve both halves."""


class Teacher(Model):
    """A trained autoregressive model: the distribution that is distilled.

    Attributes:
        stages: token counts per autoregressive step.
        conditioning: what an image is asked for by: "class" or "text".
        default_cfg: recommended guidance.
        default_top_p: recommended mass.
    """

    @property
    def default_cfg(self) -> float:
        """Recommended guidance of the zoo entry or card; none where nothing is recommended."""
        return float(self.config.get("default_cfg", self.model.no_guidance))

    @property
    def default_top_p(self) -> float:
        """Recommended mass that is kept; all of it where nothing is recommended."""
        return float(self.config.get("default_top_p", 1.0))

    @property
    def recommended(self) -> dict[str, Any]:
        """How it is best sampled, by the names that `sample` and `trajectories` take."""
        return {"cfg": self.default_cfg, "top_p": self.default_top_p}

    @torch.no_grad()
    def guided_logits(
        self, cond_B: AskedFor, tokens_BL: Tensor, cfg: float | None = None
    ) -> Tensor:
        """Teacher-forced logits with guidance, before temperature and filters.

        Args:
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            tokens_BL: int64 [B, L].
            cfg: guidance as the family means it; None = off.

        Returns:
            float32 [B, L, V].
        """
        cond = self.condition(cond_B)
        return self.forced_logits(cond, self._tokens(tokens_BL, len(cond)), cfg)

    @torch.no_grad()
    def forced_logits(self, cond: Condition, tokens_BL: Tensor, cfg: float | None) -> Tensor:
        """`guided_logits` of what a training loop has at hand: a condition and checked tokens."""
        logits: Tensor = self.model(cond, tokens_BL)
        if self.guides(cfg):
            null = self.model(self.model.null(cond), tokens_BL)
            logits = self.model.guide(logits, null, cfg, None)
        return logits

    def sample(
        self,
        cond_B: AskedFor,
        *,
        cfg: float | None = None,
        cfg_interval: int = -1,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        index: Sequence[int] | Tensor | None = None,
        skip: int = 0,
    ) -> Tensor:
        """Plain autoregressive sampling; with `skip`, the baseline skip-n.

        Skip-n (arXiv 2510.21003, appendix E.5) makes the last n stages in one pass, all their
        tokens drawn independently of one another: K - n + 1 passes in place of K.

        Args:
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            cfg: guidance as the family means it; None = off.
            cfg_interval: guide the first cfg_interval + 2 stages only; -1 = all.
            top_k: codes kept, 0 = off, 1 = greedy.
            top_p: mass kept, 1 = off.
            temperature: divides the logits.
            seed: together with `index` decides every draw.
            index: sample indices [B]; None = 0..B-1.
            skip: stages of that one pass, from 0 to all; 0 and 1 are plain sampling.

        Returns:
            int64 tokens [B, L].

        Raises:
            ConfigError: if the network's logits are NaN or infinite, as an overflow makes them; if
                the model has fewer than `skip` stages.
        """
        cond = self.condition(cond_B)
        index_B = self._index(index, len(cond))
        uniform_BL = uniforms(seed, index_B, self.num_tokens)
        if not is_integer(skip) or not 0 <= skip <= len(self.stages):
            raise ConfigError(
                f"skip={skip!r} must be an integer from 0 to {len(self.stages)}, the stages of "
                f"{self.name}"
            )
        # Of one stage there is nothing to skip: equal rules share a graph.
        skip = 0 if skip == 1 else skip
        rules = Rules(cfg, cfg_interval, top_k, top_p, temperature, skip=skip)
        return self._roll_out(cond, draw, uniform_BL, rules)

    def trajectories(
        self,
        cond_B: AskedFor,
        index_B: Sequence[int] | Tensor,
        *,
        seed: int,
        cfg: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        solver: str = "ab4",
        num_evals: int | None = None,
    ) -> Tensor:
        """The token sequences that this teacher's flow assigns to `noise(seed, index)`.

        Each stage's noise is transported to tokens under the teacher's distribution given the
        stages before (arXiv 2412.17153, section 3.2): over random noise they are distributed as
        `sample`'s.

        Args:
            cond_B: class ids [B]; for a text model texts, or (features [B, T, D], mask [B, T]).
            index_B: sample indices [B].
            seed: run seed of the noise.
            cfg: as in `sample`.
            top_k: as in `sample`.
            top_p: as in `sample`.
            temperature: as in `sample`.
            solver: of the transport.
            num_evals: of the transport; None = its default.

        Returns:
            int64 tokens [B, L].

        Raises:
            ConfigError: if the network's logits are NaN or infinite, as an overflow makes them.
        """
        cond = self.condition(cond_B)
        index = self._index(index_B, len(cond))
        noise_BLE = standard_normal(seed, index, (self.num_tokens, self.codebook.shape[1]))
        rules = Rules(cfg, -1, top_k, top_p, temperature)
        return self._roll_out(cond, _Carry(self.transport(solver, num_evals)), noise_BLE, rules)

    def continue_from(
        self,
        cond: Condition,
        prefix_BP: Tensor,
        last_stage: int,
        *,
        seed: int,
        index: Tensor,
        **sampling: Any,
    ) -> Tensor:
        """Sample on from tokens of the first stages up to stage `last_stage`, int64 [B, tokens]."""
        refuse_unknown(sampling, SAMPLING)
        uniform_BL = uniforms(seed, index, self.num_tokens)
        rules = Rules(**{**SAMPLING, **sampling})
        return self._roll_out(cond, draw, uniform_BL, rules, prefix_BP, last_stage)

    def guides(self, cfg: float | None) -> bool:
        """Whether guidance `cfg` does anything; refuses what is no number."""
        if cfg is not None and not is_finite(cfg):
            raise ConfigError(f"cfg={cfg!r} is no guidance; give a finite number, or None for none")
        return bool(self.model.guides(cfg))

    def transport(self, solver: str, num_evals: int | None) -> Transport:
        """The map of this teacher's codebook, made once for each pair of settings."""
        known: dict[tuple[str, int | None], Transport] = self.__dict__.setdefault("_maps", {})
        if (solver, num_evals) not in known:
            known[solver, num_evals] = Transport(self.codebook, solver, num_evals)
        return known[solver, num_evals]

    @torch.no_grad()
    def _roll_out(
        self,
        cond: Condition,
        choose: Choice,
        random: Tensor,
        rules: Rules,
        prefix_BP: Tensor | None = None,
        last_stage: int | None = None,
    ) -> Tensor:
        """Tokens of the stages before `last_stage`, those of the prefix among them, int64."""
        check_filters(rules.temperature, rules.top_k, rules.top_p)
        if not is_integer(rules.cfg_interval):
            raise ConfigError(
                f"cfg_interval={rules.cfg_interval!r} must be an integer; -1 = all stages"
            )
        guided = self.guides(rules.cfg)
        if guided:
            cond = concatenate(cond, self.model.null(cond))
        first = 0 if prefix_BP is None else self.stage_starts().index(prefix_BP.shape[1])
        stages = range(first, len(self.stages) if last_stage is None else last_stage)

        def write(random: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            prefix = () if prefix_BP is None else given[:1]
            asked = from_tensors(given[len(prefix) :])
            return self._write(asked, choose, random, rules, guided, stages, *prefix)

        prefix = () if prefix_BP is None else (prefix_BP,)
        tokens, finite = self.replayed(
            (choose, rules, guided, stages), write, random, *prefix, *as_tensors(cond)
        )
        # Looked at once all is done: on a GPU a look at every stage would wait for it.
        if not bool(finite):
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self.name} gives logits that are not finite in {dtype}; use another dtype, or "
                "mend the checkpoint"
            )
        return tokens

    def _write(
        self,
        cond: Condition,
        choose: Choice,
        random: Tensor,
        rules: Rules,
        guided: bool,
        stages: range,
        prefix_BP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Stage by stage logits, guidance, filters, choice; and whether all logits were finite."""
        starts = self.stage_starts()
        tokens = [] if prefix_BP is None else [prefix_BP]
        finite = []
        decoder: Decoder = self.model.decoder(
            cond, prefix_BP, unmasked_prefix=rules.unmasked_prefix
        )
        at_once = max(rules.skip, 1)
        passes = [(stage,) for stage in stages[: len(stages) - at_once]]
        for several in (*passes, stages[len(stages) - at_once :]):
            logits = decoder.logits(len(several))
            if guided:
                logits = self._guided(logits, several, rules, stages.start)
            logits = filter_logits(
                logits, rules.temperature, rules.top_k, rules.top_p, self.model.top_p_filter
            )
            finite.append(logits.amax(-1).isfinite().all())
            drawn = slice(starts[several[0]], starts[several[-1] + 1])
            tokens.append(choose(logits, random[:, drawn]))
            if several[-1] != stages[-1]:
                decoder.append(tokens[-1])
        return torch.cat(tokens, 1), torch.stack(finite).all()

    def _guided(
        self, logits_2BlV: Tensor, stages: Sequence[int], rules: Rules, first: int
    ) -> Tensor:
        """Logits of these stages under guidance, of a batch and behind it its null half."""
        guided = []
        for stage, logits in zip(
            stages, logits_2BlV.split([self.stages[stage] for stage in stages], 1), strict=True
        ):
            conditional, null = logits.chunk(2)
            # Counted from where sampling begins, as upstream does behind a prefix too.
            off = 0 <= rules.cfg_interval < stage - first - 1
            guided.append(
                conditional if off else self.model.guide(conditional, null, rules.cfg, stage)
            )
        return guided[0] if len(guided) == 1 else torch.cat(guided, 1)


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse names that are not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            )
            raise ConfigError(f"unknown sampling setting {name!r}{hint}")

"""Rows of a trajectory set once more through its teacher, compared with what is written.

A float sum varies with the batch it is part of and with the threads that share it, so whole batches
of the plan are recomputed, by the plan's number of threads.

Shapes: B rows of a batch, L all tokens.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddray.errors import ShardError
from ddray.progress import Progress
from ddray.sets.conditions import load_encoder, read_conditions
from ddray.sets.makers import Maker, kinds_of, maker_on, makers_of
from ddray.sets.trajectories.making import planned_teacher, sample_rows
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet

# Differing rows that a report names one by one.
_NAMED = 5
# Stages that it tells of: there may be hundreds.
_STAGES_NAMED = 10
# Of tokens with the same past, the share that another device must find again. Of the bundled
# models 0.96 and 0.98 are where bfloat16 stands for float32, which is more than a device does;
# 0.08 and 0.54 are by other noise, 0.15 and 0.67 by other classes (100 rows each).
LEAST_AGREEMENT = 0.9


@dataclass
class Recomputation:
    """What a recomputation found.

    Attributes:
        here: what recomputed.
        made_on: kinds of device that made the set, [] if unknown.
        made_by: what made it, as exactly as is known; [] if only the kinds are.
        rows: rows recomputed.
        batches: batches that they form.
        tokens: tokens of these rows.
        differing_rows: rows of which a token, or the label, differs.
        differing_tokens: tokens that differ.
        with_same_past: tokens of all stages up to the first that differs in a row, that included.
        equal_of_these: that are as written.
        parted: rows by the stage in which they first differ.
        wrong_labels: rows whose label or caption is not the plan's, whatever the device.
        named: a line for each of the first differing rows.
    """

    here: Maker
    made_on: list[str]
    made_by: list[Maker]
    rows: int = 0
    batches: int = 0
    tokens: int = 0
    differing_rows: int = 0
    differing_tokens: int = 0
    with_same_past: int = 0
    equal_of_these: int = 0
    parted: Counter[int] = field(default_factory=Counter)
    wrong_labels: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row is as written, or on another model of device enough tokens are."""
        if not self.differing_rows:
            return True
        return not (self.comparable or self.wrong_labels) and self.agreement >= LEAST_AGREEMENT

    @property
    def comparable(self) -> bool:
        """Whether this model of device made the set bit by bit, as far as is known."""
        if self.made_by:
            return all(maker.is_like(self.here) for maker in self.made_by)
        return not self.made_on or self.made_on == [self.here.kind]

    @property
    def agreement(self) -> float:
        """Share of equal tokens with the same past; those behind follow from others."""
        return self.equal_of_these / self.with_same_past if self.with_same_past else 1.0

    def lines(self) -> list[str]:
        """The outcome for people: one line, and one for each row that is named."""
        if not self.rows:
            return ["recomputed nothing: no batch of the set is there whole"]
        head = f"recomputed {self.rows} rows ({self.batches} batches) on {self.here.device}"
        if not self.differing_rows:
            return [f"{head}: all as written ({self._origin()})"]
        differ = f"{self.differing_rows} rows and {self.differing_tokens} of {self.tokens} tokens"
        lines = [f"{head}: {differ} differ ({self._origin()})"]
        if not self.comparable:
            equal = 1 - self.differing_tokens / self.tokens
            lines.append(
                f"on another model of device some may: {equal:.1%} of all tokens are equal, and of "
                f"those with the same past {self.agreement:.1%}, where {LEAST_AGREEMENT:.0%} must "
                f"be; rows part first: {self._places()}"
            )
        return [*lines, *self.named]

    def _places(self) -> str:
        """Stages in which rows part, the first ones by number."""
        stages = sorted(self.parted.items())
        told = [f"{rows} in stage {stage}" for stage, rows in stages[:_STAGES_NAMED]]
        later = sum(rows for _, rows in stages[_STAGES_NAMED:])
        return ", ".join([*told, *([f"{later} later"] if later else [])]) or "nowhere"

    def _origin(self) -> str:
        """Where the set was made, and what was another version there."""
        names = sorted({maker.device for maker in self.made_by}) or self.made_on
        others = {change for maker in self.made_by for change in maker.differences(self.here)}
        told = [f"made on {', '.join(names) or 'an unknown kind of device'}"]
        return "; ".join([*told, *sorted(others if self.comparable else ())])


def recompute(uri: str, num_rows: int) -> Recomputation:
    """Recompute whole batches, chosen at random by the plan hash, until `num_rows` are covered.

    On the kind of device that made the set, where that is known and here. The same model must find
    every bit again, another one `LEAST_AGREEMENT` of the tokens with the same past. Damaged shards
    are passed over: `TrajectorySet.verify` reports them. Progress goes to stderr.

    Args:
        uri: of the set, complete or not.
        num_rows: rows to cover at least, if the set has as many.

    Raises:
        ConfigError: if the plan's teacher is not here.
        ShardError: if there is no set, the teacher has other weights, or captions are missing.
        StorageError: if the set cannot be read.
    """
    trajectories = TrajectorySet.open(uri)
    plan, kinds = trajectories.plan, kinds_of(trajectories.storage)
    on_gpu = "cuda" in kinds and torch.cuda.is_available()
    teacher = planned_teacher(plan, "cuda" if on_gpu else "cpu")
    encode = load_encoder(plan, teacher)
    makers = makers_of(trajectories.storage)
    outcome = Recomputation(maker_on(teacher.device), kinds, makers)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        with Progress("recompute", min(num_rows, plan.count), "rows") as bar:
            bar.begin()
            for batch in _batches_in_random_order(trajectories):
                if outcome.rows >= num_rows:
                    break
                shard = batch.start // plan.shard_rows
                try:
                    _, label_B, there_BL = trajectories.rows(batch.start, batch.stop)
                except ShardError:
                    continue
                conditions = read_conditions(trajectories, [shard], encode)
                rows_B = np.asarray(batch) - shard * plan.shard_rows
                here_BL = sample_rows(teacher, plan, batch, conditions.of(rows_B))
                asked_B = conditions.label[rows_B]
                _compare(outcome, plan, batch, (label_B, there_BL), (asked_B, here_BL))
                bar.advance_to(min(outcome.rows, num_rows))
    finally:
        torch.set_num_threads(threads)
    return outcome


def _batches_in_random_order(trajectories: TrajectorySet) -> Iterator[range]:
    plan = trajectories.plan
    batches = [batch for k in trajectories.listing().sizes for batch in plan.batches(k)]
    for choice in plan.random_choice().permutation(len(batches)):
        yield batches[choice]


def _compare(
    outcome: Recomputation,
    plan: TrajectoryPlan,
    batch: range,
    there: tuple[npt.NDArray[Any], npt.NDArray[np.unsignedinteger]],
    here: tuple[npt.NDArray[Any], npt.NDArray[np.int64]],
) -> None:
    """Add a batch to the outcome: labels [B] and tokens [B, L] of both."""
    (label_B, there_BL), (asked_B, here_BL) = there, here
    differs_BL = there_BL != here_BL
    wrong_B = label_B != asked_B
    rows = np.flatnonzero(differs_BL.any(1) | wrong_B)
    outcome.rows += len(batch)
    outcome.batches += 1
    outcome.tokens += there_BL.size
    outcome.differing_rows += len(rows)
    outcome.differing_tokens += int(differs_BL.sum())
    outcome.wrong_labels += int(wrong_B.sum())
    _count_until_they_part(outcome, plan, differs_BL)
    for row in rows[: _NAMED - len(outcome.named)]:
        what = []
        if wrong_B[row]:
            what.append(f"label {label_B[row]} there, {asked_B[row]} in the plan")
        if differs_BL[row].any():
            what.append(_first_difference(plan, there_BL[row], here_BL[row]))
        outcome.named.append(f"differs: index {batch[row]}: {'; '.join(what)}")


def _count_until_they_part(
    outcome: Recomputation, plan: TrajectoryPlan, differs_BL: npt.NDArray[np.bool_]
) -> None:
    """Tokens of each row up to the stage in which it first differs: they have the same past."""
    for differs_L in differs_BL:
        end = differs_L.size
        if differs_L.any():
            stage = _stage_of(plan, int(differs_L.argmax()))
            outcome.parted[stage] += 1
            end = sum(plan.stages[: stage + 1])
        outcome.with_same_past += end
        outcome.equal_of_these += end - int(differs_L[:end].sum())


def _stage_of(plan: TrajectoryPlan, token: int) -> int:
    return int(np.searchsorted(list(accumulate(plan.stages)), token, side="right"))


def _first_difference(
    plan: TrajectoryPlan, there_L: npt.NDArray[np.unsignedinteger], here_L: npt.NDArray[np.int64]
) -> str:
    """Where two rows part: behind that, a stage follows from tokens that differ already."""
    differs_L = there_L != here_L
    token = int(differs_L.argmax())
    stage = _stage_of(plan, token)
    start = sum(plan.stages[:stage])
    in_stage = int(differs_L[start : start + plan.stages[stage]].sum())
    return (
        f"first in stage {stage}, token {token}: {there_L[token]} there, {here_L[token]} here "
        f"({in_stage} of the stage's {plan.stages[stage]} tokens, {differs_L.sum()} in all)"
    )

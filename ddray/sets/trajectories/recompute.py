"""Rows of a trajectory set once more through its teacher, compared with what is written.

A float sum varies with the batch it is part of and with the threads that share it, so whole batches
of the plan are recomputed, by the plan's number of threads.

Shapes: B rows of a batch, L all tokens.
"""

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
from ddray.sets.trajectories.making import made_on, planned_teacher, sample_rows
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet

# Differing rows that a report names one by one.
_NAMED = 5


@dataclass
class Recomputation:
    """What a recomputation found.

    Attributes:
        device: kind of device that recomputed.
        made_on: kinds of device that made the set, [] if unknown.
        rows: rows recomputed.
        batches: batches that they form.
        tokens: tokens of these rows.
        differing_rows: rows of which a token, or the label, differs.
        differing_tokens: tokens that differ.
        wrong_labels: rows whose label or caption is not the plan's, whatever the device.
        named: a line for each of the first differing rows.
    """

    device: str
    made_on: list[str]
    rows: int = 0
    batches: int = 0
    tokens: int = 0
    differing_rows: int = 0
    differing_tokens: int = 0
    wrong_labels: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row is as written, or nothing follows from those that are not."""
        return not self.differing_rows or not (self.comparable or self.wrong_labels)

    @property
    def comparable(self) -> bool:
        """Whether this kind of device made the set, as far as is known."""
        return not self.made_on or self.made_on == [self.device]

    def lines(self) -> list[str]:
        """The outcome for people: one line, and one for each row that is named."""
        if not self.rows:
            return ["recomputed nothing: no batch of the set is there whole"]
        made_on = f"made on {', '.join(self.made_on) or 'an unknown kind of device'}"
        head = f"recomputed {self.rows} rows ({self.batches} batches) on {self.device}"
        if not self.differing_rows:
            return [f"{head}: all as written ({made_on})"]
        differ = f"{self.differing_rows} rows and {self.differing_tokens} of {self.tokens} tokens"
        hint = "" if self.comparable else ", where tokens may differ: this proves nothing"
        return [f"{head}: {differ} differ ({made_on}{hint})", *self.named]


def recompute(uri: str, num_rows: int) -> Recomputation:
    """Recompute whole batches, chosen at random by the plan hash, until `num_rows` are covered.

    On the kind of device that made the set, where that is known and here. Damaged shards are
    passed over: `TrajectorySet.verify` reports them. Progress goes to stderr.

    Args:
        uri: of the set, complete or not.
        num_rows: rows to cover at least, if the set has as many.

    Raises:
        ConfigError: if the plan's teacher is not here.
        ShardError: if there is no set, the teacher has other weights, or captions are missing.
        StorageError: if the set cannot be read.
    """
    trajectories = TrajectorySet.open(uri)
    plan, devices = trajectories.plan, made_on(trajectories.storage)
    on_gpu = "cuda" in devices and torch.cuda.is_available()
    teacher = planned_teacher(plan, "cuda" if on_gpu else "cpu")
    encode = load_encoder(plan, teacher)
    outcome = Recomputation(teacher.device.type, devices)
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
    for row in rows[: _NAMED - len(outcome.named)]:
        what = []
        if wrong_B[row]:
            what.append(f"label {label_B[row]} there, {asked_B[row]} in the plan")
        if differs_BL[row].any():
            what.append(_first_difference(plan, there_BL[row], here_BL[row]))
        outcome.named.append(f"differs: index {batch[row]}: {'; '.join(what)}")


def _first_difference(
    plan: TrajectoryPlan, there_L: npt.NDArray[np.unsignedinteger], here_L: npt.NDArray[np.int64]
) -> str:
    """Where two rows part: behind that, a stage follows from tokens that differ already."""
    ends = list(accumulate(plan.stages))
    differs_L = there_L != here_L
    token = int(differs_L.argmax())
    stage = int(np.searchsorted(ends, token, side="right"))
    in_stage = int(differs_L[ends[stage] - plan.stages[stage] : ends[stage]].sum())
    return (
        f"first in stage {stage}, token {token}: {there_L[token]} there, {here_L[token]} here "
        f"({in_stage} of the stage's {plan.stages[stage]} tokens, {differs_L.sum()} in all)"
    )

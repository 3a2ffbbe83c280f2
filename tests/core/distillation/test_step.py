"""Facts about one step: micro batches, steps that are not taken, critics beside the student."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.config.distillation import DistillConfig
from ddray.distillation.critics import Critic
from ddray.distillation.distilled import DistilledDecoding
from ddray.distillation.step import Agreement, Means, TrainingStep
from ddray.distillation.stream import Batch
from ddray.method.teacher import Teacher
from ddray.models.zoo import new_student
from tests.core.tiny import tiny_teacher

ROWS = 8
ALONE = Agreement(1, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher()


class PlainEngine:
    """Plain gradient descent with the operations of an engine."""

    def __init__(self, teacher: Teacher, accumulation: int):
        torch.manual_seed(0)
        self.network, _ = new_student(teacher)
        self._accumulation, self._seen = accumulation, 0
        self.discarded = 0

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        logits, codes = self.network(*inputs)
        self.logits: Tensor = logits
        self.logits.retain_grad()
        return logits, codes

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self, rate: float, step: int) -> None:
        self._seen += 1
        if self._seen % self._accumulation == 0:
            torch.optim.SGD(self.network.parameters(), rate).step()
            self.network.zero_grad()

    def discard(self) -> None:
        self.network.zero_grad()
        self._seen = 0
        self.discarded += 1

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


class Doubter:
    """A critic that says the same of everything, and counts what is asked of it."""

    def __init__(self, loss: float):
        self.value, self.updates, self.discards, self.shares = loss, 0, 0, list[float]()

    def loss(self, prediction: Any, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.shares.append(share)
        return torch.tensor(self.value), {"doubt": torch.tensor(self.value)}

    def update(self, average: Any) -> None:
        self.updates += 1

    def discard(self) -> None:
        self.discards += 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _batch(teacher: Teacher, noise: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    length, width = teacher.num_tokens, teacher.codebook.shape[1]
    return Batch(
        noise * torch.randn(ROWS, length, width, generator=generator),
        torch.randint(len(teacher.codebook), (ROWS, length), generator=generator),
        torch.randint(teacher.num_classes, (ROWS,), generator=generator),
        torch.arange(ROWS),
    )


def _step(
    teacher: Teacher, accumulation: int = 1, critics: tuple[Critic, ...] = ()
) -> tuple[PlainEngine, TrainingStep]:
    config = DistillConfig(
        batch_size=ROWS, accumulation=accumulation, lr=0.1, warmup=0, schedule=(0, 2)
    )
    engine = PlainEngine(teacher, accumulation)
    objective = DistilledDecoding(config, teacher, critics)
    return engine, TrainingStep(engine, objective, config, ALONE)


def test_micro_batches_move_the_weights_as_the_whole_batch_does(teacher: Teacher) -> None:
    moved, said = [], []
    for accumulation in (1, 2, 4):
        engine, step = _step(teacher, accumulation)
        figures, _ = step.take(_batch(teacher), 0)
        assert figures is not None
        moved.append(engine.weights())
        said.append({name: float(value) for name, value in figures.items()})
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], atol=1e-6, rtol=1e-5)
    for other in said[1:]:
        assert other == pytest.approx(said[0], rel=1e-5)


def test_figures_by_t_add_up_to_the_whole(teacher: Teacher) -> None:
    _, step = _step(teacher)
    figures, loss = step.take(_batch(teacher), 0)
    assert figures is not None
    # Rows at t = 0 are asked for four tokens, rows at t = 2 for two.
    whole = (2 * figures["cross_entropy_t0"] + figures["cross_entropy_t2"]) / 3
    assert float(figures["cross_entropy"]) == pytest.approx(float(whole), rel=1e-5)
    assert loss == float(figures["loss"])


@pytest.mark.parametrize("reason", ["data", "critic"])
def test_a_loss_that_is_not_finite_moves_nothing(teacher: Teacher, reason: str) -> None:
    critic = Doubter(math.nan if reason == "critic" else 0.5)
    engine, step = _step(teacher, 2, (critic,))
    before = engine.weights()
    figures, loss = step.take(_batch(teacher, math.inf if reason == "data" else 1.0), 0)
    assert figures is None
    assert math.isnan(loss)
    assert torch.equal(engine.weights(), before)
    assert (engine.discarded, critic.discards, critic.updates) == (1, 1, 0)


def test_a_critic_is_asked_for_every_micro_batch_and_learns_once(teacher: Teacher) -> None:
    critic = Doubter(0.25)
    _, step = _step(teacher, 2, (critic,))
    figures, _ = step.take(_batch(teacher), 0)
    _, alone = _step(teacher, 2)
    without, _ = alone.take(_batch(teacher), 0)
    assert figures is not None and without is not None
    assert critic.shares == [0.5, 0.5]
    assert critic.updates == 1
    assert float(figures["doubt"]) == 0.25
    assert float(figures["loss"]) == pytest.approx(float(without["loss"]) + 0.25, rel=1e-6)


class Lover(Doubter):
    """A critic that wants every logit to be larger."""

    def loss(self, prediction: Any, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        return -prediction.logits_BLV.sum(), {}


def test_a_critic_moves_no_token_that_the_next_jump_keeps(teacher: Teacher) -> None:
    config = DistillConfig(batch_size=ROWS, logits_weight=0, code_weight=0, schedule=(0, 1, 3))
    engine = PlainEngine(teacher, 1)
    objective = DistilledDecoding(config, teacher, (Lover(0.0),))
    step = TrainingStep(engine, objective, config, ALONE)
    step.take(_batch(teacher), 0)
    moved_BL = engine.logits.grad.abs().sum(-1) > 0
    # Rows take t = 0, 1, 3 in turns; what lies behind 1, 3 and 3 is not kept.
    first_B = torch.tensor([(1, 3, 3)[row % 3] for row in range(ROWS)])
    assert torch.equal(moved_BL, torch.arange(teacher.num_tokens) >= first_B[:, None])


def test_means_are_over_the_steps_that_were_taken() -> None:
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "other": torch.tensor(-value)})
    assert means.steps == 3
    assert means.over(ALONE) == {"loss": 3.0, "other": -3.0}

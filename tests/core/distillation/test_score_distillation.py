"""Facts about the two models that judge a student's own sequences."""

import copy

import pytest
import torch

from ddray.config.distillation import DistillConfig
from ddray.distillation.losses import Prediction
from ddray.distillation.score_distillation import ScoreDistillation
from ddray.method.student import token_scores
from ddray.storage.checkpoint import fingerprint
from tests.core.tiny import tiny_teacher, tiny_var

TEACHERS = {"llamagen": tiny_teacher, "var": tiny_var}


def prediction(teacher, seed=0, rows=3):
    """What some student could say; its heads are leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    count, vocab, width = teacher.num_tokens, *teacher.codebook.shape
    asked = torch.arange(count).expand(rows, -1) >= torch.arange(rows)[:, None]
    return Prediction(
        torch.randn(rows, count, vocab, generator=generator).requires_grad_(True),
        torch.randn(rows, count, width, generator=generator).requires_grad_(True),
        torch.randint(vocab, (rows, count), generator=generator),
        asked,
        torch.arange(rows) % 3,
        torch.arange(rows),
    )


def critic(teacher, precision=0.0, cfg=None, **settings):
    config = DistillConfig(score={"weight": 1.0, "start": 0, **settings})
    return ScoreDistillation(config, teacher, code_precision=precision, cfg=cfg)


@pytest.mark.parametrize("family", TEACHERS)
def test_an_imitator_that_is_the_teacher_has_nothing_to_say(family):
    teacher = TEACHERS[family]()
    said = prediction(teacher)
    loss, scalars = critic(teacher).loss(said)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(scalars["teacher_nats"]) == pytest.approx(float(scalars["imitator_nats"]))
    assert said.logits_BLV.grad.abs().max() < 1e-6


@pytest.mark.parametrize("precision", [0.0, 8.0])
def test_the_gradient_is_the_excess_weighed_by_the_students_probabilities(precision):
    teacher = tiny_teacher()
    judge, said = critic(teacher, precision, cfg=2.0), prediction(teacher)
    with torch.no_grad():
        for weight in judge.imitator.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    heads = said.logits_BLV, said.codes_BLE
    scores = token_scores(*heads, teacher.codebook, precision)
    tokens = torch.where(said.asked_BL, scores.argmax(-1), said.tokens_BL)
    theirs = teacher.guided_logits(said.cond, tokens, cfg=2.0).log_softmax(-1)
    excess = judge.imitator(said.cond, tokens).log_softmax(-1).detach() - theirs
    share = scores.softmax(-1).detach()
    expected = share * (excess - (share * excess).sum(-1, keepdim=True))
    expected = expected * said.asked_BL[..., None] / said.asked_BL.sum()
    loss, _ = judge.loss(said)
    loss.backward()
    torch.testing.assert_close(said.logits_BLV.grad, expected, atol=1e-6, rtol=1e-4)
    assert (said.codes_BLE.grad is not None) == (precision > 0)


def test_the_imitator_learns_the_students_sequences_and_the_teacher_stays():
    teacher = tiny_teacher()
    before = teacher.fingerprint
    judge, said = critic(teacher, imitator_lr=1e-2), prediction(teacher)
    costs = []
    for _ in range(30):
        costs.append(float(judge.loss(said)[1]["imitator_nats"]))
        judge.update()
    assert costs[-1] < 0.7 * costs[0]
    assert fingerprint(teacher.model) == before


def test_nothing_reaches_the_student_before_the_start():
    teacher = tiny_teacher()
    judge, said = critic(teacher, start=1), prediction(teacher)
    assert judge.loss(said)[0] == 0
    judge.update()
    assert judge.loss(said)[0] != 0


def test_halves_of_a_batch_add_up_to_its_step():
    teacher = tiny_teacher()
    whole, parts, said = critic(teacher), critic(teacher), prediction(teacher, rows=4)
    # Every row asks for as many tokens, so the halves weigh the same.
    said = said._replace(asked_BL=torch.ones_like(said.asked_BL))
    whole.loss(said)
    for rows in (slice(0, 2), slice(2, 4)):
        parts.loss(Prediction(*(part[rows] for part in said)), share=0.5)
    pairs = zip(whole.imitator.parameters(), parts.imitator.parameters(), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one.grad, two.grad)


def test_a_restored_imitator_goes_on_bit_for_bit():
    teacher = tiny_teacher()
    first, said = critic(teacher), prediction(teacher)

    def advance(judge):
        loss, _ = judge.loss(said)
        judge.update()
        return float(loss.detach())

    for _ in range(3):
        advance(first)
    second = critic(teacher)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [advance(first) for _ in range(3)] == [advance(second) for _ in range(3)]

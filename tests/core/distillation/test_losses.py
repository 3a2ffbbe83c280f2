"""Facts about the distillation loss: closed forms, which tokens count, and where gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F

import ddray
from ddray.distillation.losses import distillation_loss
from ddray.method.student import given_tokens, keep_data
from ddray.models.zoo import new_student
from tests.core.tiny import gradient_errors, tiny_teacher

STAGES = (1, 2, 3)
CODEBOOK = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def batch(rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 6, 3, generator=generator)
    tokens = torch.randint(5, (rows, 6), generator=generator)
    return noise, tokens, torch.zeros(rows, dtype=torch.long)


def fixed(logits, codes):
    """A student whose heads say the same whatever they see."""
    return lambda x, cond, t: (logits, codes)


def test_a_perfect_student_has_no_loss():
    noise, tokens, cond = batch()
    student = fixed(100.0 * F.one_hot(tokens, 5), CODEBOOK[tokens])
    loss = distillation_loss(
        student, STAGES, CODEBOOK, noise, tokens, cond, torch.arange(3)[[0, 1, 2, 0]]
    )
    assert loss.total < 1e-6
    assert loss.cross_entropy < 1e-6
    assert loss.code_error == 0
    assert loss.token_accuracy == 1


def test_an_indifferent_student_has_the_entropy_of_the_vocabulary():
    noise, tokens, cond = batch()
    student = fixed(torch.zeros(4, 6, 5), torch.zeros(4, 6, 3))
    loss = distillation_loss(student, STAGES, CODEBOOK, noise, tokens, cond, cond)
    assert float(loss.cross_entropy) == pytest.approx(math.log(5))
    # Codes on the unit sphere have a mean square of 1 / E, which is also the unit of the error.
    assert float(loss.code_error) == pytest.approx(1 / 3)
    assert float(loss.total) == pytest.approx(math.log(5) + 1)


def test_weights_multiply_the_two_parts():
    noise, tokens, cond = batch()
    student = fixed(torch.zeros(4, 6, 5), torch.zeros(4, 6, 3))
    loss = distillation_loss(
        student, STAGES, CODEBOOK, noise, tokens, cond, cond, logits_weight=0.25, code_weight=3.0
    )
    assert float(loss.total) == pytest.approx(0.25 * math.log(5) + 3)


def test_the_code_error_has_the_same_meaning_at_any_scale_of_the_codebook():
    noise, tokens, cond = batch()
    totals = []
    for scale in (1.0, 20.0):
        student = fixed(torch.zeros(4, 6, 5), torch.full((4, 6, 3), 0.3 * scale))
        codes = CODEBOOK * scale
        totals.append(distillation_loss(student, STAGES, codes, noise, tokens, cond, cond).total)
    assert float(totals[0]) == pytest.approx(float(totals[1]), rel=1e-5)


def test_given_tokens_do_not_count():
    noise, tokens, cond = batch()
    t = torch.full((4,), 2)
    logits = 100.0 * F.one_hot((tokens + 1) % 5, 5)  # wrong everywhere ...
    codes = torch.full((4, 6, 3), 7.0)
    logits[:, 3:] = 100.0 * F.one_hot(tokens, 5)[:, 3:]  # ... but behind the first two stages
    codes[:, 3:] = CODEBOOK[tokens][:, 3:]
    loss = distillation_loss(fixed(logits, codes), STAGES, CODEBOOK, noise, tokens, cond, t)
    assert loss.total < 1e-6
    assert loss.token_accuracy == 1


def test_a_mixture_of_t_averages_over_the_tokens_asked_for():
    noise, tokens, cond = batch()
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, 5, generator=generator)
    codes = torch.randn(4, 6, 3, generator=generator)
    t = torch.tensor([0, 1, 2, 1])
    first_asked = [0, 1, 3, 1]
    entropies, errors, hits = [], [], []
    for row, first in enumerate(first_asked):
        for position in range(first, 6):
            token = tokens[row, position]
            entropies.append(-float(logits[row, position].log_softmax(-1)[token]))
            errors += (codes[row, position] - CODEBOOK[token]).square().tolist()
            hits.append(float(logits[row, position].argmax() == token))
    loss = distillation_loss(fixed(logits, codes), STAGES, CODEBOOK, noise, tokens, cond, t)
    assert float(loss.cross_entropy) == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert float(loss.code_error) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert float(loss.token_accuracy) == pytest.approx(sum(hits) / len(hits), rel=1e-5)


def test_the_student_sees_data_up_to_t_and_noise_behind():
    noise, tokens, cond = batch(rows=3)
    t, seen = torch.tensor([0, 1, 3]), []

    def student(x, cond_B, t_B):
        seen.append((x, t_B))
        return torch.zeros(3, 6, 5), torch.zeros(3, 6, 3)

    distillation_loss(student, STAGES, CODEBOOK, noise, tokens, cond, t)
    x, t_seen = seen[0]
    codes = CODEBOOK[tokens]
    assert torch.equal(t_seen, t)
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[1], torch.cat((codes[1, :1], noise[1, 1:])))
    assert torch.equal(x[2], codes[2])


def test_given_tokens_are_those_of_the_first_stages():
    given = given_tokens(STAGES, torch.tensor([0, 1, 2, 3]))
    assert given.sum(-1).tolist() == [0, 1, 3, 6]
    assert torch.equal(given, given.long().sort(-1, descending=True).values.bool())
    ones = keep_data(torch.ones(4, 6, 3), torch.zeros(4, 6, 3), given)
    assert torch.equal(ones, given[..., None].expand(4, 6, 3).float())


def test_gradients_reach_both_heads_and_the_trunk():
    teacher = tiny_teacher()
    network, _ = new_student(teacher)
    tokens = teacher.sample([0, 1], seed=1)
    noise, cond, t = ddray.noise(0, [0, 1], (4, 4)), torch.tensor([0, 1]), torch.tensor([0, 2])
    args = (network, teacher.stages, teacher.codebook, noise, tokens, cond, t)
    distillation_loss(*args).total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    network.zero_grad()
    distillation_loss(*args, code_weight=0.0).total.backward()
    assert network.final_layer_conti.linear.weight.grad.abs().sum() == 0
    assert network.output.weight.grad.abs().sum() > 0


def test_a_few_steps_lower_the_loss():
    teacher = tiny_teacher()
    torch.manual_seed(0)
    network, _ = new_student(teacher)
    cond = torch.arange(64) % 3
    tokens = teacher.trajectories(cond, range(64), seed=0)
    noise, t = ddray.noise(0, range(64), (4, 4)), torch.arange(64) % 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = distillation_loss(network, teacher.stages, teacher.codebook, noise, tokens, cond, t)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("digits-var-dd", marks=pytest.mark.chaos), "digits-llamagen-dd"]
)
def test_gradients_in_bfloat16_are_those_of_float32(name):
    """Of every parameter; a sum of thousands of rows in bfloat16 would stop growing."""
    errors = gradient_errors(name, "cpu")
    assert max(errors.values()) <= 0.02, max(errors, key=errors.get)

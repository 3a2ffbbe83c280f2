"""Facts about the plain-torch half of distillation: stages, rate, average, loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddray
from ddray.distillation.optimization import (
    MovingAverage,
    batch_loss,
    compile_blocks,
    jump_stages,
    learning_rate,
    parameter_groups,
    recompute_activations,
    set_learning_rate,
)
from ddray.distillation.stream import Batch
from ddray.models.zoo import new_student
from tests.core.tiny import tiny_teacher, tiny_var

CPU = torch.device("cpu")


def test_the_stages_of_a_schedule_take_turns_along_the_stream() -> None:
    assert jump_stages((0, 16), 3, 4, CPU).tolist() == [16, 0, 16, 0]
    assert jump_stages((0, 5, 9), 0, 7, CPU).tolist() == [0, 5, 9, 0, 5, 9, 0]
    assert jump_stages((0,), 5, 2, CPU).tolist() == [0, 0]


@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_the_rate_warms_up_linearly_stays_and_falls_as_a_cosine_to_zero(decay: float) -> None:
    steps, peak = 200, 0.5
    rates = [learning_rate(step, steps, peak, 0.1, decay) for step in range(steps)]
    for step, rate in enumerate(rates):
        fall = max(0, step - (1 - decay) * steps) / (decay * steps)
        expected = peak * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * fall)) / 2
        assert rate == pytest.approx(expected, rel=1e-12)
    assert rates[0] == pytest.approx(peak / 20)
    assert 0 < rates[-1] < 1e-3
    if decay == 0.3:
        assert set(rates[19:141]) == {peak}


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, 200, 0.5, 0.0) == learning_rate(0, 1, 0.5, 0.05) == 0.5


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    values = torch.randn(30, 3, dtype=torch.float64)
    average = MovingAverage([values[0]], 0.9)
    expected = values[0]
    for step, value in enumerate(values[1:]):  # all within the start, which forgets faster
        average.update([value], step)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.average[0], expected.float(), atol=1e-6, rtol=1e-5)
    for step in range(80, 85):
        average.update([values[0]], step)
        expected = 0.9 * expected + 0.1 * values[0]
    torch.testing.assert_close(average.average[0], expected.float(), atol=1e-6, rtol=1e-5)


def test_the_average_of_parts_is_the_part_of_the_average() -> None:
    values = torch.randn(10, 6)
    whole = MovingAverage([values[0]], 0.5)
    parts = [MovingAverage([half], 0.5) for half in values[0].chunk(2)]
    for step, value in enumerate(values[1:]):
        whole.update([value], step)
        for part, half in zip(parts, value.chunk(2), strict=True):
            part.update([half], step)
    assert torch.equal(whole.average[0], torch.cat([part.average[0] for part in parts]))


def test_the_average_neither_follows_nor_keeps_the_weights_it_was_given() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    average = MovingAverage([weight], 0.9)
    with torch.no_grad():
        weight.zero_()
    assert average.average[0].dtype == torch.float32
    assert average.average[0].tolist() == [1, 1, 1]
    assert not average.average[0].requires_grad


def test_the_losses_of_two_workers_average_to_that_of_one() -> None:
    teacher = tiny_teacher()
    torch.manual_seed(0)
    network, _ = new_student(teacher)
    index = torch.arange(8)
    tokens = teacher.trajectories(index % 3, index, seed=7, num_evals=4)
    whole = Batch(ddray.noise(7, index, (4, 4)), tokens, index % 3, index)

    def loss(batch: Batch) -> torch.Tensor:
        # t = 0 alone: every row asks for as many tokens, so the halves weigh the same.
        return batch_loss(
            network,
            batch,
            teacher.stages,
            teacher.codebook,
            first=0,
            schedule=(0,),
            logits_weight=1.0,
            code_weight=0.5,
        ).total

    torch.testing.assert_close(sum(map(loss, whole.split(2))) / 2, loss(whole))


def test_the_layer_that_reads_codes_moves_as_if_its_inputs_had_size_one():
    torch.manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(64, 4), dim=-1)
    targets, noise = torch.randn(64, 3), torch.randn(64, 4)

    class Plain(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.code_layer, self.factor = torch.nn.Linear(4, 3), factor

    def trained(factor, groups):
        torch.manual_seed(1)
        model = Plain(factor)
        with torch.no_grad():
            model.code_layer.weight.div_(factor)
        optimizer = torch.optim.AdamW(groups(model), 1e-2, betas=(0.9, 0.95), eps=1e-12)
        for _ in range(20):
            set_learning_rate(optimizer, 1e-2)
            for inputs in (codes, noise):
                loss = (model.code_layer(inputs * factor) - targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.code_layer.weight.detach() * factor

    def common(model):
        return [{"params": [*model.parameters()], "lr_factor": 1.0, "weight_decay": 0.1}]

    scaled = trained(2.0, common)  # sqrt(E)
    plain = trained(1.0, lambda model: parameter_groups(model, codes, 0.1))
    torch.testing.assert_close(plain, scaled, atol=1e-4, rtol=1e-4)


STUDENTS = {
    "llamagen": lambda: new_student(tiny_teacher(n_layer=3)),
    "var": lambda: new_student(tiny_var()),
}


def _gradients(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    student: Any = network
    generator = torch.Generator().manual_seed(seed)
    width, length = student.config.codebook_dim, sum(student.stages)
    x_BLE = torch.randn(2, length, width, generator=generator)
    network.zero_grad()
    logits_BLV, codes_BLE = student(x_BLE, torch.tensor([0, 1]), torch.tensor([0, 1]))
    (logits_BLV.square().mean() + codes_BLE.square().mean()).backward()
    grads = {name: weight.grad for name, weight in network.named_parameters()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.chaos),  # half a minute of C++
    ],
)
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", STUDENTS)
def test_compiled_blocks_are_one_graph_and_have_the_gradients_of_plain_ones(
    family: str, recomputed: bool, backend: str
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    network, _ = STUDENTS[family]()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)  # nothing is zero, as gates and heads begin
    expected = _gradients(network)
    compile_blocks(network, backend=backend)  # refuses a break in the graph
    if recomputed:
        recompute_activations(network)
    found = _gradients(network)
    assert found.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert counters["stats"]["unique_graphs"] == 1

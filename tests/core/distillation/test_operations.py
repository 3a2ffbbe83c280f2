"""Facts about the operations of a training step: what torch counts of one that has numbers."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddray.config.distillation import DistillConfig
from ddray.config.sampling import SampleConfig
from ddray.distillation.losses import distillation_loss
from ddray.distillation.operations import step_operations
from ddray.models.zoo import new_masked, new_student
from ddray.sets.trajectories.making import make_plan
from tests.core.counting import counter
from tests.core.tiny import tiny_teacher, tiny_var

ROWS = 4
TEACHERS = {"llamagen": tiny_teacher, "var": tiny_var}


def operations(family: str, **settings: Any) -> int:
    teacher = TEACHERS[family]()
    plan = make_plan(SampleConfig(cfg=2.0), teacher)
    config = DistillConfig(
        **{"batch_size": ROWS, "precision": "bfloat16", "schedule": (0, 2), **settings}
    )
    return step_operations(new_student(teacher)[0], teacher, config, plan)


@pytest.mark.parametrize("family", TEACHERS)
def test_they_are_those_of_a_step_with_numbers(family: str) -> None:
    teacher = TEACHERS[family]()
    student, _ = new_student(teacher)
    codes = teacher.codebook
    noise = torch.randn(ROWS, teacher.num_tokens, codes.shape[1])
    tokens = torch.randint(len(codes), noise.shape[:2])
    label = torch.zeros(ROWS, dtype=torch.int64)
    # Attention as plain products, as on the meta device.
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        loss = distillation_loss(student, teacher.stages, codes, noise, tokens, label, label)
        loss.total.backward()
    assert operations(family) == counted.get_total_flops()


@pytest.mark.parametrize("family", TEACHERS)
def test_those_of_masked_decoding_are_counted_too(family: str) -> None:
    teacher = TEACHERS[family]()
    config = DistillConfig(objective="masked", batch_size=ROWS)
    network, _ = new_masked(teacher)
    tokens, label = torch.zeros(ROWS, teacher.num_tokens, dtype=torch.int64), torch.zeros(ROWS)
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        network(tokens, label.long()).sum().backward()
    plan = make_plan(SampleConfig(cfg=2.0), teacher)
    assert step_operations(network, teacher, config, plan) == counted.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("family", TEACHERS)
def test_they_do_not_depend_on_how_the_batch_is_cut(family: str) -> None:
    whole = operations(family)
    for cut in ({"workers": 2}, {"accumulation": 2}, {"activation_checkpointing": True}):
        assert operations(family, **cut) == whole


@pytest.mark.slow
@pytest.mark.parametrize("family", TEACHERS)
def test_critics_count_where_they_run(family: str) -> None:
    critics: dict[str, dict[str, Any]] = {
        "score": {"weight": 1.0},
        "adversary": {"weight": 1.0},
        "perceptual": {"distance": "tokenizer"},
    }
    alone = operations(family)
    each = [operations(family, **{name: told}) - alone for name, told in critics.items()]
    assert all(more > 0 for more in each)
    assert operations(family, **critics) == alone + sum(each)

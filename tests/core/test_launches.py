"""What a compiled training step asks of a GPU, without one."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_compiler import launches
from ddray.distillation.losses import judged
from ddray.models.var_dd import StudentBlock, VARStudentConfig

pytestmark = pytest.mark.chaos  # torch's compiler, for a quarter of a minute

ROWS, LENGTH, WIDTH = 32, 680, 1024


def test_a_block_of_vars_student_is_at_most_55_launches() -> None:
    def inputs() -> list[Any]:
        x_BSC, condition = torch.empty(ROWS, LENGTH + 1, WIDTH), torch.empty(ROWS, WIDTH)
        mark, mask = torch.empty(2, WIDTH), torch.empty(1, 1, LENGTH + 1, LENGTH + 1)
        for tensor in (x_BSC, condition, mark):
            tensor.requires_grad_(True)
        is_data = torch.empty(ROWS, LENGTH + 1, 1, dtype=torch.bool)
        return [x_BSC, condition, is_data, mark, mask]

    with FakeTensorMode():
        block = StudentBlock(VARStudentConfig(depth=16))
    counted = launches(block, inputs)
    # Five products and two of the gradient of each, attention and its gradient.
    assert counted["library"] == 5 * 3 + 2
    assert sum(counted.values()) <= 55


def test_the_loss_is_a_handful() -> None:
    def inputs() -> list[Any]:
        logits = torch.empty(ROWS, LENGTH, 4096, requires_grad=True)
        codes = torch.empty(ROWS, LENGTH, 32, requires_grad=True)
        tokens = torch.empty(ROWS, LENGTH, dtype=torch.int64)
        asked = torch.empty(ROWS, LENGTH, dtype=torch.bool)
        return [logits, codes, torch.empty(ROWS, LENGTH, 32), tokens, asked, 1.0, torch.empty(())]

    counted = launches(judged, inputs)
    assert counted["library"] == 0
    assert counted["compiled"] <= 20

"""Facts about attention by tiles that need no GPU: what it hides, what it gives, how it fails."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from ddray.distillation.optimization import compile_blocks
from ddray.models.attention import level_mask, tried_level_mask
from ddray.models.zoo import empty_student
from tests.core.tiny import tiny_var

pytestmark = pytest.mark.slow  # torch's compiler takes seconds to load


def test_it_hides_what_the_added_mask_of_the_students_hides() -> None:
    for student in (empty_student("var-d16"), tiny_var("var-dd").model):
        buffers = student.constants()
        level_L, length = buffers["lvl_1L"][0], sum(student.levels)
        mask = level_mask(level_L)
        shown = create_mask(mask.mask_mod, None, None, length, length, device="cpu")
        assert torch.equal(shown, buffers["attn_bias_for_masking"] == 0)


def test_at_published_sizes_it_leaves_out_tiles() -> None:
    level_L = empty_student("var-d16").constants()["lvl_1L"][0]
    assert level_mask(level_L).sparsity() > 25  # per cent


def test_the_student_says_the_same_by_tiles() -> None:
    student = tiny_var("var-dd").model
    tokens = sum(student.stages)
    x_BLE = torch.randn(2, tokens, student.config.codebook_dim)
    cond_B, t_B = torch.tensor([0, 1]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = student(x_BLE, cond_B, t_B)
        student._block_mask = level_mask(student.lvl_1L[0])
        eager = student(x_BLE, cond_B, t_B)
        compile_blocks(student, backend="aot_eager")  # refuses a break in the graph
        for by_tiles in (eager, student(x_BLE, cond_B, t_B)):
            for said, known in zip(by_tiles, expected, strict=True):
                torch.testing.assert_close(said, known, rtol=1e-4, atol=1e-5)


def test_where_it_fails_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.warns(UserWarning, match=r"^FlexAttention does not work on cpu.*no kernel image"):
        assert tried_level_mask(torch.tensor([0, 1, 1]), 16, torch.float32) is None


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(*qkv: torch.Tensor, block_mask: object) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: causal)
    with pytest.warns(UserWarning, match=r"its numbers are off by \d+%"):
        assert tried_level_mask(torch.tensor([0, 1, 1, 1]), 16, torch.float32) is None


def test_numbers_of_the_added_mask_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    level_L = torch.tensor([0, 1, 1, 2])
    sees = (level_L < level_L[:, None]) | torch.eye(4, dtype=torch.bool)

    def dense(*qkv: torch.Tensor, block_mask: object) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=sees)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: dense)
    assert tried_level_mask(level_L, 16, torch.float32) is not None

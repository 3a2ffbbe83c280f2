"""Facts about parity with the published code: every golden case, quantity by quantity."""

import re

import pytest
import torch

from benchmarks.parity import CASES, compare, deviations
from tests.core.tiny import GOLDEN


@pytest.mark.parametrize("case", CASES)
def test_ddray_computes_what_the_published_code_computes(case):
    found, unread = deviations(case)
    assert found
    # Steps on the way, which an output that is compared depends on.
    on_the_way = re.compile(r"^out/((step\w+|mid|zero)\.(\d|dd\d|teacher)\.|final_|noise_mask)")
    assert not {name for name in unread if not on_the_way.match(name)}
    assert not [deviation for deviation in found if not deviation.passed]


def test_no_fixture_is_left_out():
    assert {path.stem for path in (GOLDEN / "io").iterdir()} == set(CASES)


def test_a_mistake_would_show():
    exact, close = torch.tensor([1, 2]), torch.tensor([1.0, -torch.inf])
    assert not compare("ids", exact + 1, exact).passed
    assert not compare("floats", close + 3e-4, close).passed
    assert not compare("infinities", torch.tensor([1.0, 0.0]), close).passed
    assert compare("floats", close + 2e-4, close).passed

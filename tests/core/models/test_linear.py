"""Facts about the linear layer of large weights: the same numbers, the same names."""

import pytest
import torch
from torch import nn

from ddray.models.linear import Linear


@pytest.mark.parametrize("shape", [(1, 768), (16, 768), (2, 33, 768)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_torchs_layer_computes(shape, bias):
    torch.manual_seed(0)
    ours, theirs = (kind(768, 1024, bias=bias) for kind in (Linear, nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    whole = torch.randn(*shape[:-1], 2 * shape[-1])
    for x in (whole[..., :768], whole[..., ::2]):
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


def test_it_can_be_trained():
    layer = Linear(768, 1024)
    layer(torch.randn(3, 768)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


def test_it_starts_as_torchs_layer_does():
    torch.manual_seed(0)
    ours = Linear(8, 4).state_dict()
    torch.manual_seed(0)
    theirs = nn.Linear(8, 4).state_dict()
    assert ours.keys() == theirs.keys() and torch.equal(ours["weight"], theirs["weight"])

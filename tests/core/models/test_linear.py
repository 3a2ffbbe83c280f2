"""Facts about the linear layer of large weights: the same numbers, the same names."""

import pytest
import torch
from torch import nn

from ddray.models.linear import Linear, PackedLinear, packed
from ddray.models.llamagen import LlamaGen, LlamaGenConfig


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


@pytest.mark.parametrize("shape", [(3, 768), (2, 33, 768)])
@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_are_those_of_torchs_layer(shape, bias):
    torch.manual_seed(0)
    ours, theirs = (kind(768, 1024, bias=bias) for kind in (Linear, nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    x, upstream = torch.randn(shape), torch.randn(*shape[:-1], 1024)
    inputs = [x.clone().requires_grad_() for _ in (ours, theirs)]
    for layer, given in zip((ours, theirs), inputs, strict=True):
        layer(given).backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_of_frozen_weights_only_the_input_has_a_gradient():
    layer = Linear(768, 1024).requires_grad_(False)
    x = torch.randn(33, 768, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(33, -1), rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


def test_it_starts_as_torchs_layer_does():
    torch.manual_seed(0)
    ours = Linear(8, 4).state_dict()
    torch.manual_seed(0)
    theirs = nn.Linear(8, 4).state_dict()
    assert ours.keys() == theirs.keys() and torch.equal(ours["weight"], theirs["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_module_computes_the_same_from_the_same_weights(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(Linear(768, 1024, bias=False), Linear(1024, 8), nn.LayerNorm(8)).to(
        dtype
    )
    with torch.no_grad():
        copied = packed(module, 16)
        for rows in (1, 16, 33):
            x = torch.randn(rows, 768).to(dtype)
            expected = nn.functional.linear(x, module[0].weight)
            torch.testing.assert_close(copied[0](x), expected)
            base = torch.randn(rows, 1024).to(dtype)
            torch.testing.assert_close(copied[0].onto(x, base), base + copied[0](x))
    kinds = [type(layer) for layer in copied]
    assert kinds in ([PackedLinear, Linear, nn.LayerNorm], [Linear, Linear, nn.LayerNorm])
    assert [type(layer) for layer in module] == [Linear, Linear, nn.LayerNorm]
    for name, tensor in copied.state_dict().items():
        assert tensor.data_ptr() == module.state_dict()[name].data_ptr()


def test_what_is_small_trained_or_too_large_is_not_packed(monkeypatch):
    module = Linear(768, 1024)
    assert packed(module, 16) is module  # gradients are wanted
    with torch.no_grad():
        assert packed(nn.Sequential(Linear(8, 8)), 16)[0].__class__ is Linear
        monkeypatch.setattr("ddray.models.linear._MOST_PACKED_BYTES", 4 * 768 * 1024 - 1)
        assert packed(module, 16) is module


def test_a_decoder_goes_on_with_packed_weights():
    sizes = {"dim": 512, "n_layer": 2, "n_head": 8, "vocab_size": 1024, "num_classes": 3}
    torch.manual_seed(0)
    model = LlamaGen(LlamaGenConfig(**sizes, block_size=25)).eval()
    cond, tokens = torch.tensor([0, 2]), torch.randint(1024, (2, 25))
    with torch.no_grad():
        decoder = model.decoder(cond)
        steps = []
        for k in range(25):
            steps.append(decoder.logits())
            decoder.append(tokens[:, k : k + 1])
        torch.testing.assert_close(torch.cat(steps, 1), model(cond, tokens), rtol=1e-4, atol=1e-4)
    assert type(decoder._output) in (Linear, PackedLinear)

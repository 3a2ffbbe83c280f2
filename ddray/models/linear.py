"""nn.Linear with the fastest of torch's matrix products on a CPU.

torch gives float32 products to MKL, which reaches half of the processor's rate where that is not
Intel's. oneDNN, which comes with torch too and has the bfloat16 products, is up to 2.3 times as
fast there. In small products its longer way to the call, ten microseconds, costs more than it
saves.

Both lay a weight out anew in every product. By the few rows of a token that is a good part of it,
so a decoder that reads the same weights hundreds of times lays them out once (`packed`).
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From so many multiplications on oneDNN is the faster one: measured from 64 x 64 to 1024 x 1024
# weights by 1 to 1024 rows, on one thread of an AMD EPYC with AVX-512.
_MANY = 2**20
# Smaller weights are laid out too quickly to be held twice.
_LARGE = 2**19
# More than that is not held twice.
_MOST_PACKED_BYTES = 2**31

M = TypeVar("M", bound=nn.Module)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """oneDNN's product, whose gradients are two more of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `linear`."""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias, as far as they are asked for."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = upstream.flatten(0, -2)
        return (
            _product(upstream, weight.T.contiguous()) if of_x else None,
            _product(rows.T, x.flatten(0, -2).T.contiguous()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Input [..., in] times weight [out, in], plus bias [out], as torch.nn.functional.linear."""
    if (
        x.numel() * len(weight) < _MANY
        or weight.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer under torch's name, layout and initialisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)

    def onto(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto` + this layer's product of x, [..., out]; on a GPU in place, in one kernel.

        The layer has no bias.
        """
        if x.is_cuda and x.dtype == self.weight.dtype == onto.dtype and not torch.is_grad_enabled():
            onto.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.T)
            return onto
        return onto + self(x)


class PackedLinear(Linear):
    """A linear layer whose weight lies in the order in which oneDNN reads it for some rows.

    Attributes:
        packed: the weight in that order; opaque, and not in the state dict.
    """

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] to [..., out]; any number of rows goes."""
        return _product(input, self.packed, self.bias)


def packed(module: M, rows: int) -> M:
    """The module with its large weights packed, where that is faster; else the module itself.

    The copy shares all tensors with the original, and has a second one of each packed weight: it is
    for a pass over many tokens, and not to be kept while the weights may change.

    Args:
        module: linear layers, alone or in others.
        rows: that most products will have.
    """
    layers = [layer for layer in module.modules() if type(layer) is Linear and _packs(layer.weight)]
    held = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not 0 < held <= _MOST_PACKED_BYTES or torch.is_grad_enabled():
        return module
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    for layer in copied.modules():
        if type(layer) is Linear and _packs(layer.weight):
            layer.__class__ = PackedLinear
            assert isinstance(layer, PackedLinear)
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    return copied


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < _LARGE:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )

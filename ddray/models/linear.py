"""nn.Linear with the faster of torch's two matrix products on a CPU.

torch gives float32 products to MKL, which does poorly by a few rows on processors other than
Intel's. oneDNN, which comes with torch too and has the bfloat16 products, is faster there for a few
rows of a large weight, and as fast for thousands. By small weights its longer way to the call costs
more than it saves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGE = 2**19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Input [..., in] times weight [out, in], plus bias [out], as torch.nn.functional.linear."""
    if (
        weight.numel() < _LARGE
        or weight.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def linear_onto(x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    """`onto` + `linear(x, weight)`, [..., out]; on a GPU in place, in the product's own kernel."""
    if x.is_cuda and x.dtype == weight.dtype == onto.dtype and not torch.is_grad_enabled():
        onto.flatten(0, -2).addmm_(x.flatten(0, -2), weight.T)
        return onto
    return onto + linear(x, weight, None)


class Linear(nn.Linear):
    """A linear layer under torch's name, layout and initialisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)

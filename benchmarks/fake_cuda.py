"""A CUDA device where there is none: what runs on it, how many kernels it takes, when it waits.

torch's FakeTensorMode carries tensors of a device that is not here: shapes and dtypes without
numbers. Operations whose tensors lie on two devices are refused as on a real one. Here models are
carried over, kernels are counted by what reaches the dispatcher, and so are looks from the host:
each of them lets the device run empty.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock
from torch.utils.weak import WeakIdKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddray.method.flow import Transport
from ddray.method.model import Model, Tokenizer

M = TypeVar("M", bound=Model)

_ATEN = torch.ops.aten
# What allocates, or says what something is called: no kernel.
_NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "is_same_size", "_has_compatible_shallow_copy_type",
    "sym_size", "sym_stride", "sym_numel", "record_stream", "_local_scalar_dense", "device",
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Counts what reaches the dispatcher, and answers what a host would have to wait for.

    A host that asks whether all is well hears yes: `all` is true, `any` is false, a number is 0,
    and no element is out of range.

    Attributes:
        kernels: how often each operation launches one, by name.
        looks: how often the host waits for a number of the device, by operation.
        moves: copies between host and device, by direction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self._true: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        if name == "_local_scalar_dense" and on_cuda:
            self.looks[name] += 1
            (value,) = tensors
            answer = self._true.get(value, False)
            return answer if value.dtype == torch.bool else 0
        if on_cuda and (name == "nonzero" or (name == "index" and _by_mask(args[1]))):
            self.looks[name] += 1
            self.kernels[name] += 1
            return _none_of(args)
        out = func(*args, **kwargs)
        if name in ("all", "isfinite") and isinstance(out, Tensor):
            self._true[out] = True
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_") and made and tensors:
            source = tensors[-1] if name == "copy_" else tensors[0]
            if source.is_cuda != made[0].is_cuda:
                self.moves["to host" if source.is_cuda else "to device"] += 1
                return out
        if (on_cuda or any(tensor.is_cuda for tensor in made)) and not _is_view(func, name):
            self.kernels[name] += 1
        return out


class _FromNumbers(TorchFunctionMode):
    """Tensors of Python's numbers are made on the host and moved, as without a driver they must."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _by_mask(index: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


def _none_of(args: tuple[Any, ...]) -> Tensor:
    """What `nonzero`, or indexing by a mask, gives where nothing is true."""
    source = args[0]
    if len(args) == 1:
        return source.new_empty((0, source.dim()), dtype=torch.long)
    covered = sum(i.dim() if isinstance(i, Tensor) else 1 for i in args[1])
    return source.new_empty((0, *source.shape[covered:]))


def _is_view(func: Any, name: str) -> bool:
    if name in _NO_KERNEL:
        return True
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class FakeCuda:
    """Carries models over to the device that is not here.

    Attributes:
        mode: of the tensors; enter `here` to run something.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()

    @contextmanager
    def here(self) -> Iterator[Meter]:
        """Within, "cuda" is a device, and what happens on it is counted."""
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.device_count", return_value=1),
            self.mode,
            Meter() as meter,
            _FromNumbers(),
        ):
            yield meter

    def tensor(self, value: Tensor, device: str = "cuda") -> Tensor:
        """A tensor of the same shape and dtype on the device."""
        with self.mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )

    def module(self, module: nn.Module, device: str = "cuda") -> nn.Module:
        """The same network on the device."""
        carried: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            fake = self.tensor(tensor.detach(), device)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            carried[id(tensor)] = fake
        return copy.deepcopy(module, carried)

    def model(self, model: M, device: str = "cuda") -> M:
        """The same teacher or student on the device, with the maps of its codebook made."""
        codebook = model.codebook
        codec = self.module(model.tokenizer.module, device)
        network = self.module(model.model, device)
        if hasattr(network, "use_quantizer"):
            network.use_quantizer(codec.quantize)
        tokenizer = Tokenizer(codec)
        vars(tokenizer)["codebook"] = self.tensor(codebook, device)
        carried = type(model)(network, tokenizer, model.config, model.name)
        vars(carried)["_maps"] = {("ab4", None): self.transport(Transport(codebook), device)}
        return carried

    def transport(self, solve: Transport, device: str = "cuda") -> Transport:
        """The same map on the device, by the torch operations."""
        there = copy.copy(solve)
        for name, value in vars(solve).items():
            if isinstance(value, Tensor):
                setattr(there, name, self.tensor(value, device))
        return there


def is_on(device: str, *tensors: Any) -> bool:
    """Whether all are fakes of tensors on a device."""
    return all(isinstance(t, FakeTensor) and t.device.type == device for t in tensors)

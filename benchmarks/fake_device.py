"""A GPU where there is none: what runs on it, how many kernels it takes, when the host waits.

torch's FakeTensorMode carries tensors of a device that is not here: shapes and dtypes without
numbers. Operations whose tensors lie on two devices are refused as on a real one. Here models are
carried over, kernels are counted by what reaches the dispatcher, and so are looks from the host:
each of them lets the device run empty.

Without a driver autograd does not go back through tensors of "cuda". Through those of "meta" it
does, and for all else one device that is not the host is as good as another; but autocast and what
asks for "cuda" by name are then passed over.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import ddray
import ddray.method.seeding_triton
from ddray.method.flow import Transport
from ddray.method.model import Model, Tokenizer
from ddray.method.student import stage_of_tokens

M = TypeVar("M", bound=Model)

_PACKAGE = str(Path(ddray.__file__).parent)
# What allocates, or gives another name to what is there: no kernel.
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "device",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "is_same_size",
    "_local_scalar_dense",
}


class Meter(TorchDispatchMode):
    """Counts what reaches the dispatcher, and answers what the host would have to wait for.

    A host that asks whether all is well hears yes: `all` is true, `any` is false, an integer is 0,
    any other number 1, and no element is picked by a mask.

    Args:
        device: the type of the device.

    Attributes:
        kernels: launches, by the operation's name.
        looks: waits of the host for a number of the device, by the place in ddray that asks.
        moves: copies between host and device for which the host waits, by direction.
        pinned: tensors of the host that go over while it goes on.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.kernels: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self.pinned = WeakIdKeyDictionary()
        self._true = WeakIdKeyDictionary()

    @property
    def waits(self) -> int:
        """How often the host waits for the device."""
        return self.looks.total() + self.moves["to host"]

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Within, all kernels together are one of this name."""
        before = self.kernels.copy()
        yield
        self.kernels = before + Counter([name])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [*_tensors(args), *_tensors(kwargs.values())]
        is_there = any(map(self._is_there, given))
        if name == "_local_scalar_dense":
            self._note_look(is_there)
            if given[0].dtype == torch.bool:
                return self._true.get(given[0], False)
            return 1.0 if given[0].is_floating_point() else 0
        if name == "nonzero" or (name == "index" and _picks_by_mask(args[1])):
            self._note_look(is_there)
            self.kernels[name] += is_there
            return _none_of(*args)
        out = func(*args, **kwargs)
        if name in ("all", "isfinite"):
            self._true[out] = True
        made = [*_tensors((out,))]
        if name in ("_to_copy", "copy_") and self._note_move(given[-1], made[0]):
            return out
        if (is_there or any(map(self._is_there, made))) and not _is_view(func):
            self.kernels[name] += 1
        return out

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device

    def _note_look(self, is_there: bool) -> None:
        if is_there:
            self.looks[_asker()] += 1

    def _note_move(self, source: Tensor, made: Tensor) -> bool:
        if self._is_there(source) == self._is_there(made):
            return False
        if source not in self.pinned:
            self.moves["to host" if self._is_there(source) else "to device"] += 1
        return True


class _AsOnADevice(TorchFunctionMode):
    """What only a driver could do.

    Tensors of Python's numbers are made on the host and moved. Attention is one kernel; without a
    GPU torch takes it apart.
    """

    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
            made = args[0] if isinstance(args[0], Tensor) else func(*args, **kwargs)
            if isinstance(made, FakeTensor):
                made.constant = None  # else what torch knows the value of goes to a real device
            if pinned:
                self._meter.pinned[made] = True
            return made if device is None else made.to(device)
        if func is F.scaled_dot_product_attention:
            with self._meter.as_one("attention"):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _asker() -> str:
    """File and function of ddray that the call comes from."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def _picks_by_mask(index: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


def _none_of(source: Tensor, index: Any = None) -> Tensor:
    """What `nonzero`, or picking by a mask, gives where nothing is true."""
    if index is None:
        return source.new_empty((0, source.dim()), dtype=torch.long)
    covered = sum(i.dim() if isinstance(i, Tensor) else 1 for i in index)
    return source.new_empty((0, *source.shape[covered:]))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    name = func.overloadpacket.__name__
    return name in _NO_KERNEL or (bool(aliases) and not any(a.is_write for a in aliases))


def _fused_noise(seed: Any, index_B: Tensor, numbers: int, stream: int) -> Tensor:
    """Stands for the one kernel of ddray.method.seeding_triton."""
    return torch.zeros(len(index_B), numbers, device=index_B.device)


def _fused_transport(noise_NE: Tensor, logits_NV: Tensor) -> Tensor:
    """Stands for the one kernel of ddray.method.flow_triton."""
    return logits_NV.argmax(-1)


def _moved(module: nn.Module, device: Any) -> nn.Module:
    """`nn.Module.to`, which does not swap fakes that something refers to."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            moved = nn.Parameter(weight.detach().to(device), weight.requires_grad)
            setattr(part, name, moved)
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, value.to(device))
    return module


def _no_autocast() -> Any:
    return mock.patch("torch.autocast", lambda *_, **__: nullcontext())


class _OneMode(FakeTensorMode):
    """A copy of a tensor is on the same device."""

    def __deepcopy__(self, memo: Any) -> _OneMode:
        return self


class FakeDevice:
    """Carries models over to a device that is not here.

    Args:
        type: "cuda", or "meta" for what has a backward pass.
        num_evals: of the transport; None = its default.
    """

    def __init__(self, type: str = "cuda", num_evals: int | None = None) -> None:
        self.type, self._num_evals = type, num_evals
        with torch._functorch.config.patch(fake_tensor_allow_meta=True):
            self._mode = _OneMode()

    @contextmanager
    def here(self) -> Iterator[Meter]:
        """Within, the device is there, and what happens on it is counted."""
        stage_of_tokens.cache_clear()  # of this device, and not of another that is not here
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.device_count", return_value=1),
            mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch("ddray.method.seeding.can_fuse", self._is_cuda),
            mock.patch("ddray.method.seeding_triton.noise", _fused_noise),
            torch._functorch.config.patch(fake_tensor_allow_meta=True),
            mock.patch.object(nn.Module, "to", _moved),
            mock.patch.object(nn.Module, "float", lambda module: module),  # all are already
            _no_autocast() if self.type == "meta" else nullcontext(),
            self._mode,
            Meter(self.type) as meter,
            _AsOnADevice(meter),
        ):
            yield meter
        stage_of_tokens.cache_clear()

    def _is_cuda(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def tensor(
        self, value: Tensor, device: str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of the same shape on the device, or on another; None = of the same dtype."""
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        where = device or self.type
        with self._mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=kind, device=where)

    def module(
        self, module: nn.Module, device: str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The same network on the device, or on another; None = in the same dtype."""
        carried: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            fake = self.tensor(tensor.detach(), device, dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            carried[id(tensor)] = fake
        return copy.deepcopy(module, carried)

    def model(self, model: M, codec_on: str | None = None, dtype: torch.dtype | None = None) -> M:
        """The same teacher or student on the device, with the map of its codebook made.

        Args:
            model: the original; one without weights gets the fused map.
            codec_on: where the tokenizer stays; None = there too.
            dtype: of the network; None = as it is.
        """
        codebook = model.codebook
        codec = self.module(model.tokenizer.module, codec_on)
        network: Any = self.module(model.model, dtype=dtype)
        if hasattr(network, "use_quantizer"):
            network.use_quantizer(codec.quantize)
        tokenizer = Tokenizer(codec)
        vars(tokenizer)["codebook"] = self.tensor(codebook, codec_on)
        carried = type(model)(network, tokenizer, model.config, model.name)
        carried.graphs.enabled = False  # only a driver records
        if codebook.is_meta:
            vars(carried)["_maps"] = {("ab4", None): _fused_transport}
            return carried
        vars(tokenizer)["fingerprint"] = model.tokenizer.fingerprint
        solve = Transport(codebook, num_evals=self._num_evals)
        for name, value in vars(solve).items():
            if isinstance(value, Tensor):
                setattr(solve, name, self.tensor(value, codec_on))
        vars(carried)["_maps"] = {("ab4", None): solve}
        return carried

    def holds(self, *tensors: Any) -> bool:
        """Whether all are tensors on the device."""
        return all(isinstance(t, FakeTensor) and t.device.type == self.type for t in tensors)

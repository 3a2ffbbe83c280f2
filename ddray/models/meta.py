"""Modules on the meta device: names and shapes, without memory and without an import too many."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ddray.errors import ConfigError, DDRayError, one_line

_DRAWS = frozenset(
    {
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.normal_,
        torch.nn.init.trunc_normal_,
        torch.nn.init.uniform_,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
    }
)


class _NothingDrawn(TorchFunctionMode):
    """Skips random initial values, which say nothing on the meta device.

    Their meta kernels are written in Python: they are two thirds of the time in which a module is
    made, and that of `normal_` would import sympy and 900 modules more, a second at the start of
    every worker.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta(what: str) -> Iterator[None]:
    """Within, modules are made without memory.

    Args:
        what: is made, for people.

    Raises:
        ConfigError: for sizes of types or magnitudes that nothing can be made of.
    """
    try:
        with torch.device("meta"), _NothingDrawn():
            yield
    except DDRayError:
        raise
    except Exception as error:  # whatever torch, or arithmetic, says of them
        said = one_line(error)
        raise ConfigError(f"{what} has sizes that nothing can be made of: {said}") from error

"""Distilled Decoding at cluster scale: an autoregressive image model becomes a one-step generator.

Importing this package is instant: torch, ray, deepspeed and pyarrow load when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddray.method.flow import transport
    from ddray.method.seeding import noise
    from ddray.models.zoo import load_student, load_teacher

_HOMES = {
    "load_student": "ddray.models.zoo",
    "load_teacher": "ddray.models.zoo",
    "noise": "ddray.method.seeding",
    "transport": "ddray.method.flow",
}

__all__ = ["__version__", "load_student", "load_teacher", "noise", "transport"]


def __getattr__(name: str) -> Any:
    if name == "metrics":  # a package: importing it makes it an attribute
        return import_module("ddray.metrics")
    if name not in _HOMES:
        raise AttributeError(f"module 'ddray' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

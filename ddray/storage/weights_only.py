"""What `torch.save` wrote, loaded without running anything that the file asks for.

PyTorch's own loader of weights admits tensors and plain containers. Training code keeps more
beside them: its arguments, a best score that is a NumPy number, the folder it wrote to. What of
that only holds values is admitted too; everything else is refused by its name.
"""

import argparse
import datetime
import decimal
import fractions
import pathlib
import pickle
import re
import types
import uuid
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddray.errors import CheckpointError
from ddray.file_kind import PICKLE, explained, kind_of

_WANTED = "PyTorch checkpoint"
_UNSAFE = re.compile(r"(?:GLOBAL|function|class) (?:<(?:class|built-in function) '?)?([\w.]*\w)")
# Of a NumPy dtype: numbers, text and times of a fixed size; not objects, and not records.
_PLAIN_DTYPE = re.compile(r"[<>|=]?[?biufcSUMm]\d*(\[\w+\])?$")


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or not _PLAIN_DTYPE.match(code):
        raise pickle.UnpicklingError("GLOBAL numpy.dtype of objects or records")
    return np.dtype(code, False, True)  # a copy, as its state is set next


def _windows_path(*parts: str) -> pathlib.PurePath:
    """A path of Windows, which elsewhere is none but can be looked at."""
    return pathlib.PureWindowsPath(*parts)


def _dictionary(*_: Any) -> dict[Any, Any]:
    """In place of one with a default: only plain ones are filled."""
    return {}


def _list(*_: Any) -> list[Any]:
    """In place of a queue, likewise."""
    return []


def _harmless() -> Iterator[Any]:
    """Classes and functions that make values and do nothing else, some under older names."""
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        yield scalar, f"{module}.scalar"
        yield array, f"{module}._reconstruct"
    yield _dtype, "numpy.dtype"
    yield np.ndarray
    # Kinds of dtypes, whose instances are given their byte order.
    yield from {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSUMm"}
    for module in ("pathlib", "pathlib._local"):
        yield pathlib.PurePosixPath, f"{module}.PosixPath"
        yield pathlib.PurePosixPath, f"{module}.PurePosixPath"
        yield _windows_path, f"{module}.WindowsPath"
        yield _windows_path, f"{module}.PureWindowsPath"
    yield _dictionary, "collections.defaultdict"
    yield _list, "collections.deque"
    yield from (argparse.Namespace, types.SimpleNamespace)
    yield from (dict, list, tuple, frozenset, int, float, bool, str, slice, range)
    yield from (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
    yield from (datetime.timezone, decimal.Decimal, fractions.Fraction, uuid.UUID)
    yield torch.torch_version.TorchVersion


def load_weights_only(path: Path) -> Any:
    """What a `.pt` / `.pth` file holds; tensors of a zip archive are mapped, not read.

    Raises:
        CheckpointError: if it is damaged, is another kind of file, or would run code; with the
            name of what it would run.
    """
    try:
        # Only the zip format of PyTorch >= 1.6 can be mapped.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([*_harmless()]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:  # one flipped bit makes torch.load fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(_no_checkpoint(path, reason)) from error


def _refusal(path: Path, said: str) -> str:
    """What is wrong with a file that PyTorch's loader of weights does not take."""
    said = said.partition("WeightsUnpickler error:")[2] or said
    kind, name = kind_of(path), _UNSAFE.search(said)
    # A text, too, may begin as a pickle that names a function.
    if name and (kind is None or kind.name in (PICKLE, f"a {_WANTED}")):
        return (
            f"{path} is no {_WANTED} of weights alone: it names {_todays(name[1])}, and would run "
            "code of its own when loaded; if you trust it, load it where its program is installed, "
            "by torch.load(FILE, weights_only=False), and torch.save the state dict alone"
        )
    if "Unsupported operand" in said and zipfile.is_zipfile(path):
        return (
            f"{path} is no {_WANTED} that can be read without running it: save it again by "
            "torch.save(..., pickle_protocol=2), which is the default"
        )
    return _no_checkpoint(path, said.strip().splitlines()[0][:300])


def _todays(name: str) -> str:
    """A name of Python 2, which files that all versions read have, as it is now."""
    module, dot, function = name.rpartition(".")
    return f"{IMPORT_MAPPING.get(module, module)}{dot}{function}"


def _no_checkpoint(path: Path, reason: str) -> str:
    return explained(f"{path} is damaged or no {_WANTED}", path, reason, _WANTED)

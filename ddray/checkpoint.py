"""Weights on disk: folders of safetensors + JSON that ddray writes, and the containers it reads.

Nothing here unpickles code: `.pt` files load with `weights_only`. Imports ddray.errors and
ddray.storage.
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ddray.errors import CheckpointError
from ddray.storage import open_storage

StateDict = Mapping[str, Tensor]

MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
CONFIG_FILE = "config.json"

# Where published files keep the weights, outermost first (EMA weights before raw ones).
_CONTAINERS = (
    ("trainer", "ema_parameters"),
    ("trainer", "var_wo_ddp"),
    ("ema",),
    ("model",),
    ("module",),
    ("state_dict",),
)


# What a published file may carry beside weights: a table that is computed, and caches.
_LEFTOVER = re.compile(r"^freqs_cis$|\.kv_cache\.|\.causal_mask$")


def save_folder(
    uri: str | Path,
    config: Mapping[str, Any],
    *,
    model: StateDict,
    tokenizer: StateDict | None = None,
) -> None:
    """Write a model folder; `config.json` comes last, so a folder that has one is whole.

    Args:
        uri: folder, local or s3.
        config: plain JSON values; `family` and sizes.
        model: weights.
        tokenizer: weights of the tokenizer, if the folder carries one.

    Raises:
        StorageError: if the folder cannot be written.
    """
    storage = open_storage(str(uri))
    storage.delete(CONFIG_FILE)
    for name, state in ((MODEL_FILE, model), (TOKENIZER_FILE, tokenizer)):
        if state is not None:
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            storage.write(name, save_safetensors(on_cpu))
    storage.write(CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_folder(uri: str | Path) -> tuple[dict[str, Any], StateDict, StateDict | None]:
    """Read a model folder: its config, the weights, and the tokenizer's weights if there are any.

    Raises:
        CheckpointError: if it is no model folder or a file is damaged.
    """
    storage = open_storage(str(uri))
    if not storage.exists(CONFIG_FILE):
        raise CheckpointError(f"{uri} is no model folder: it has no {CONFIG_FILE}")
    try:
        config = json.loads(storage.read(CONFIG_FILE))
    except ValueError as error:
        raise CheckpointError(f"{storage.join(CONFIG_FILE)} is not JSON: {error}") from error
    if not isinstance(config, dict) or "family" not in config:
        raise CheckpointError(f"{storage.join(CONFIG_FILE)} names no model family")
    if not storage.exists(MODEL_FILE):
        raise CheckpointError(f"{uri} is incomplete: it has no {MODEL_FILE}")
    model = _parse(storage.read(MODEL_FILE), storage.join(MODEL_FILE))
    tokenizer = None
    if storage.exists(TOKENIZER_FILE):
        tokenizer = _parse(storage.read(TOKENIZER_FILE), storage.join(TOKENIZER_FILE))
    return config, model, tokenizer


def _parse(data: bytes, name: str) -> StateDict:
    try:
        state: StateDict = load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{name} is truncated or no safetensors file: {error}") from error
    return state


def read_weights(source: str | Path | Mapping[str, Any]) -> StateDict:
    """Weights from a file, in any container the published checkpoints use, or from memory.

    Args:
        source: a `.safetensors` file, a `.pt` / `.pth` file, or what such a file holds.

    Returns:
        The bare state dict.

    Raises:
        CheckpointError: if the file is missing, damaged, needs pickled code, or holds no weights.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, "the given state dict")
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is no file")
    if path.suffix == ".safetensors":
        return _parse(path.read_bytes(), str(path))
    try:
        # Only the zip format of PyTorch >= 1.6 can be mapped.
        # Training code keeps its Namespace of arguments.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            container = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint of weights alone: it is damaged, or would run code "
            "of its own when loaded"
        ) from error
    except Exception as error:  # one flipped bit makes torch.load fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from error
    return _unwrap(container, str(path))


def _unwrap(container: Any, name: str) -> StateDict:
    for keys in _CONTAINERS:
        inner = container
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and inner:
            container = inner
            break
    if not isinstance(container, Mapping) or not container:
        raise CheckpointError(f"{name} holds no state dict")
    strangers = [key for key, value in container.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{name} holds more than weights: {_some(strangers)}")
    return container


def _some(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:6]))
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_into(
    module: nn.Module, state: StateDict, what: str, optional: frozenset[str] = frozenset()
) -> None:
    """Fill a module built on the meta device, float16 files as float32, and leave it in eval mode.

    Args:
        module: the module; its tensors are replaced, not copied into.
        state: weights under the module's names.
        what: name of the source for messages.
        optional: names that a file may lack or have without being refused.

    Raises:
        CheckpointError: with the missing and unexpected keys and wrong shapes.
    """
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and k not in optional]
    unexpected = [
        k for k in state if k not in wanted and k not in optional and not _LEFTOVER.search(k)
    ]
    shapes = [
        f"{k} is {[*state[k].shape]} instead of {[*wanted[k].shape]}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = [
        f"{title} {_some(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("shapes", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit the model: {'; '.join(problems)}")
    ready = {
        name: state[name].float() if state[name].is_floating_point() else state[name]
        for name in wanted
        if name in state
    }
    for name in optional & wanted.keys() - ready.keys():
        ready[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    module.load_state_dict(ready, assign=True)
    module.requires_grad_(False).eval()


def fingerprint(module: nn.Module, optional: frozenset[str] = frozenset()) -> str:
    """sha256 of a module's weights: names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in optional:
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Weights on disk: folders of safetensors + JSON that ddray writes, and the containers it reads.

Nothing here unpickles code: `.pt` files load with `weights_only`
(ddray.storage.weights_only).
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file as map_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ddray.errors import CheckpointError, one_line
from ddray.file_kind import explained, is_safetensors, json_value
from ddray.locations import HUB, local_file
from ddray.storage import open_beside, open_storage
from ddray.storage.weights_only import load_weights_only

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
# A training checkpoint of VAR holds its tokenizer as well.
_TOKENIZER_CONTAINERS = (("trainer", "vae_local"), *_CONTAINERS)

# What a published file may carry beside weights: a table that is computed, and caches.
_LEFTOVER = re.compile(r"^freqs_cis$|\.kv_cache\.|(^|\.)causal_mask$")

# What wrappers of training put in front of every name.
_WRAPPERS = ("module.", "_orig_mod.")

# Names in one message: enough to see which layers they are of.
_SHOWN = 20

_SHARD_INDEX = "model.safetensors.index.json"


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


def read_config(uri: str | Path) -> dict[str, Any]:
    """Read what a model folder says of its model, without the weights.

    Raises:
        CheckpointError: if it is no model folder or its config is damaged.
    """
    storage = open_storage(str(uri))
    if not storage.exists(CONFIG_FILE):
        raise CheckpointError(f"{uri} is no model folder: it has no {CONFIG_FILE}")
    data = storage.read(CONFIG_FILE)
    try:
        config = json_value(data)
    except ValueError as error:
        refusal = f"{storage.join(CONFIG_FILE)} is not JSON"
        raise CheckpointError(explained(refusal, data, error, "JSON")) from error
    if not isinstance(config, dict) or "family" not in config:
        raise CheckpointError(f"{storage.join(CONFIG_FILE)} names no model family")
    return config


def load_folder(uri: str | Path) -> tuple[dict[str, Any], StateDict, StateDict | None]:
    """Read a model folder: its config, the weights, and the tokenizer's weights if there are any.

    Raises:
        CheckpointError: if it is no model folder or a file is damaged.
    """
    config = read_config(uri)
    storage = open_storage(str(uri))
    if not storage.exists(MODEL_FILE):
        raise CheckpointError(f"{uri} is incomplete: it has no {MODEL_FILE}")
    model = _safetensors(parse_safetensors, storage.read(MODEL_FILE), storage.join(MODEL_FILE))
    tokenizer = None
    if storage.exists(TOKENIZER_FILE):
        tokenizer = _safetensors(
            parse_safetensors, storage.read(TOKENIZER_FILE), storage.join(TOKENIZER_FILE)
        )
    return config, model, tokenizer


def _safetensors(load: Callable[[Any], StateDict], source: bytes | Path, name: str) -> StateDict:
    """What a file holds: parsed from its bytes, or mapped from its path."""
    try:
        return load(source)
    except (SafetensorError, ValueError, OSError) as error:
        refusal = f"{name} is truncated or no safetensors file"
        raise CheckpointError(explained(refusal, source, error, "safetensors")) from error


def read_weights(source: str | Path | Mapping[str, Any], *, tokenizer: bool = False) -> StateDict:
    """Weights from a file, in any container the published checkpoints use, or from memory.

    Args:
        source: a `.safetensors` file; a folder of them, or its `*.index.json`; a `.pt` / `.pth`
            file, or what such a file holds, whose float32 tensors are used as they are, not
            copied; or `hf://owner/repository/path` of one of them.
        tokenizer: whether the tokenizer's weights are asked for, where a file holds both.

    Returns:
        The bare state dict; tensors of local files are mapped, not read.

    Raises:
        CheckpointError: if the file is missing, damaged, needs pickled code, or holds no weights.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, "the given state dict", tokenizer)
    if not isinstance(source, str | Path):
        raise CheckpointError(f"weights are a file or a state dict, not {type(source).__name__}")
    path = _fetch(str(source)) if str(source).startswith(HUB) else Path(local_file(source))
    for name in (_SHARD_INDEX, MODEL_FILE):
        if (path / name).is_file():
            path /= name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is no file")
    if path.name.endswith(".index.json"):
        return _unwrap(_read_shards(path), str(path), tokenizer)
    if path.suffix == ".safetensors" or _begins_as_safetensors(path):
        return _unwrap(_safetensors(map_safetensors, path, str(path)), str(path), tokenizer)
    container = load_weights_only(path)
    return _unwrap(container, str(path), tokenizer)


def write_container(path: str | Path, state: StateDict, keys: Sequence[str]) -> None:
    """Write a `.pt` / `.pth` file with the weights under nested keys, as published files have them.

    Raises:
        StorageError: if it cannot be written; nothing is left behind then.
    """
    container: Any = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for key in reversed(keys):
        container = {key: container}
    storage, name = open_beside(path)
    buffer = io.BytesIO()
    torch.save(container, buffer)
    storage.write(name, buffer.getvalue())


def _begins_as_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_safetensors(file.read(16))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _read_shards(index: Path) -> StateDict:
    try:
        weight_map = json_value(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refusal = f"{index} is no index of safetensors shards"
        raise CheckpointError(explained(refusal, index, "", "JSON")) from error
    state: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there")
        path = index.parent / name
        state.update(_safetensors(map_safetensors, path, str(path)))
    lost = [name for name in weight_map if name not in state]
    if lost:
        raise CheckpointError(f"{index} promises weights that its shards lack: {_some(lost)}")
    return state


def _fetch(uri: str) -> Path:
    """Download `hf://owner/repository/path` into the Hub's own cache."""
    parts = uri.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise CheckpointError(f"{uri} is not of the form hf://owner/repository/path/of/file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{uri} needs the package huggingface_hub; install ddray[hub], or download the file "
            "and give its path"
        ) from error
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as error:  # its errors are those of requests, of the hub, and of the disk
        raise CheckpointError(
            f"cannot fetch {uri}: {one_line(error)}; download the file elsewhere and give its path"
        ) from error


def _unwrap(container: Any, name: str, tokenizer: bool) -> StateDict:
    for keys in _TOKENIZER_CONTAINERS if tokenizer else _CONTAINERS:
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
    if not all(isinstance(key, str) for key in container):
        raise CheckpointError(f"{name} holds tensors under names that are no text")
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in container)), None):
        container = {key.removeprefix(prefix): value for key, value in container.items()}
    return container


def _some(names: list[str]) -> str:
    shown = ", ".join(map(str, names[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load_into(
    module: nn.Module, state: StateDict, what: str, optional: frozenset[str] = frozenset()
) -> None:
    """Fill a module built on the meta device, float16 files as float32, and leave it in eval mode.

    Args:
        module: the module; its tensors are replaced, not copied into. Its `constants()`, if it has
            any, are entries that follow from its sizes: a file may lack them, but not contradict.
        state: weights under the module's names.
        what: name of the source for messages.
        optional: names that a file may lack or have without being refused.

    Raises:
        CheckpointError: with the missing and unexpected keys and wrong shapes.
    """
    wanted = module.state_dict()
    constants: dict[str, Tensor] = getattr(module, "constants", dict)()
    dispensable = optional | constants.keys()
    missing = [k for k in wanted if k not in state and k not in dispensable]
    unexpected = [
        k for k in state if k not in wanted and k not in optional and not _LEFTOVER.search(k)
    ]
    shapes = [
        f"{k} is {[*state[k].shape]} instead of {[*wanted[k].shape]}"
        for k in wanted
        if k in state and k not in optional and state[k].shape != wanted[k].shape
    ]
    contradicted = [k for k, value in constants.items() if _differs(state.get(k), value)]
    kinds = [
        f"{k} is {state[k].dtype} instead of {wanted[k].dtype}"
        for k in wanted
        if k in state and state[k].is_floating_point() != wanted[k].is_floating_point()
    ]
    problems = [
        f"{title} {_some(names)}"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("shapes", shapes),
            ("dtypes", kinds),
            ("made for other sizes", contradicted),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit the model: {'; '.join(problems)}")
    # Statistics are left out on purpose: they mean nothing here, and official ones differ in shape.
    ready = {
        # Detached: a caller's own parameters stay trainable.
        name: (state[name].float() if state[name].is_floating_point() else state[name]).detach()
        for name in wanted
        if name in state and name not in dispensable
    }
    for name in optional & wanted.keys():
        ready[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    module.load_state_dict(ready | constants, assign=True)
    module.requires_grad_(False).eval()


def _differs(given: Tensor | None, value: Tensor) -> bool:
    """Whether a tensor of a file contradicts a constant; another shape is reported as such."""
    if given is None or given.shape != value.shape:
        return False
    return not torch.equal(given.cpu().to(value.dtype), value)


def fingerprint(module: nn.Module, optional: frozenset[str] = frozenset()) -> str:
    """sha256 of a module's weights: names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in optional:
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]};".encode())
            numbers = tensor.detach().cpu().contiguous().flatten()  # a scalar has no view as bytes
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

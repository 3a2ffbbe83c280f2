"""Published files: what to download, whether a file is the model it should be, and writing one.

Shapes: B batch, L tokens, E code width.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddray.errors import CheckpointError, ConfigError
from ddray.method.masked_decoding import Masked
from ddray.method.seeding import noise
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models.catalog import BUNDLED_MODELS, PUBLISHED, File
from ddray.models.families import FAMILIES, empty_network, empty_tokenizer
from ddray.models.zoo import image_side, load_masked, load_student, load_teacher, resolve
from ddray.storage.checkpoint import (
    load_folder,
    read_config,
    read_weights,
    save_folder,
    write_container,
)


def describe(name: str) -> dict[str, Any]:
    """What a model is; of a published one what to download, and how it is meant to be sampled.

    Args:
        name: a name of `ddray models`, or a model folder.

    Raises:
        ConfigError: for an unknown name, or a folder whose sizes do not fit together.
        CheckpointError: for a folder whose config is damaged.
    """
    where = resolve(name)
    if not isinstance(where, Mapping):
        return _described_folder(name, str(where))
    published = PUBLISHED[name]
    files = {"tokenizer": published.tokenizer}
    if published.checkpoint is not None:
        files = {"checkpoint": published.checkpoint, **files}
    load = f"ddray.load_{published.kind}({name!r}"
    for argument, file in files.items():
        load += f", {argument}={file.uri!r}"
    return {
        "name": name,
        "kind": published.kind,
        "sizes": published.config,
        "files": {argument: _where(file) for argument, file in files.items()},
        "load": f"{load})",
        "or": "download the files anywhere and give their paths",
        "sampling": published.sampling,
        "published": published.figure,
        "license": published.license,
    }


# What of a config says how a model is used; and what nobody asks for who looks at one.
_USE = ("schedule", "code_precision", "default_cfg", "default_top_p", "teacher", "step")
_ASIDE = (*_USE, "ddray_version", "teacher_fingerprint", "tokenizer_fingerprint", "quality")


def _described_folder(name: str, folder: str) -> dict[str, Any]:
    """What the config of a bundled model, or of any folder, says of it."""
    config = read_config(folder)
    network, codec = empty_network(config, name), empty_tokenizer(config, name)
    told: dict[str, Any] = {
        "name": name,
        "what": BUNDLED_MODELS.get(name, "a model folder"),
        "kind": FAMILIES[config["family"]].kind,
        "parameters": f"{_millions(network)} million",
    }
    if codec is not None:
        side, channels = image_side(config, name), getattr(codec.config, "in_channels", 3)
        told["tokenizer"] = f"{_millions(codec)} million, codes of width {codec.config.code_width}"
        told["image size"] = f"{side} x {side}, {'grey' if channels == 1 else 'colour'}"
    by_class = network.conditioning == "class"
    told["conditioned on"] = f"{network.config.num_classes} classes" if by_class else "captions"
    stages = len(network.stages)
    told["stages"] = f"{stages} of {', '.join(map(str, sorted({*network.stages})))} tokens"
    told |= {key: config[key] for key in _USE if key in config}
    sizes = {key: value for key, value in config.items() if key not in _ASIDE}
    return {**told, "sizes": sizes, "files": folder}


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


def _where(file: File) -> str:
    return f"{file.name} of huggingface.co/{file.repository}; weights: {file.container}"


@torch.inference_mode()
def verify(name: str, checkpoint: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Load a model from files and run it once.

    Loading refuses missing and unexpected keys and other shapes, by name.

    Args:
        name: a name, a model folder, or anything else the loaders take.
        checkpoint: file of the network; None = what the name brings.
        tokenizer: file of the tokenizer; likewise.

    Returns:
        Fingerprints, sizes and the range of one forward pass.

    Raises:
        ConfigError: for an unknown name or a missing file argument.
        CheckpointError: for files that do not fit, or weights that give no finite numbers.
    """
    model = _load(name, checkpoint, tokenizer)
    output = _forward(model)
    if not bool(output.isfinite().all()):
        raise CheckpointError(f"{name}: a forward pass gives numbers that are not finite")
    parameters = [*model.model.parameters()]
    return {
        "name": name,
        "family": model.config["family"],
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(model.model.state_dict()),
        "dtypes_of_the_file": _dtypes(name, checkpoint),
        "fingerprint": model.fingerprint,
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "stages": len(model.stages),
        "tokens": model.num_tokens,
        "codebook": [*model.codebook.shape],
        "forward": {"shape": [*output.shape], "largest": round(float(output.abs().max()), 3)},
    }


_LOADERS: Mapping[str, Callable[..., Teacher | Student | Masked]] = {
    "teacher": load_teacher,
    "student": load_student,
    "masked model": load_masked,
}


def _load(
    name: str, checkpoint: str | None, tokenizer: str | None, device: str = "auto"
) -> Teacher | Student | Masked:
    """A model of any kind by its name."""
    config = resolve(name)
    if not isinstance(config, dict):
        config = load_folder(str(config))[0]
    kind = FAMILIES[config["family"]].kind if config["family"] in FAMILIES else "teacher"
    return _LOADERS[kind](name, checkpoint=checkpoint, tokenizer=tokenizer, device=device)


def _dtypes(name: str, checkpoint: str | None) -> list[str]:
    state = load_folder(str(resolve(name)))[1] if checkpoint is None else read_weights(checkpoint)
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})


def _forward(model: Any) -> Tensor:
    """Logits of one sample of class 0, or of an empty caption."""
    cond: Any = [0]
    if model.conditioning == "text":
        sizes = model.model.config
        cond = (torch.zeros(1, 1, sizes.caption_dim), torch.ones(1, 1))
    width = model.codebook.shape[1]
    if isinstance(model, Student):
        start = noise(0, [0], (model.num_tokens, width), model.device)
        return model.predict(start, cond, torch.zeros(1, dtype=torch.long))[0]
    tokens = torch.zeros(1, model.num_tokens, dtype=torch.long)
    logits: Tensor = model.guided_logits(cond, tokens)
    return logits


def export(
    name: str,
    out: str,
    layout: Literal["upstream", "ddray"] = "upstream",
    checkpoint: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write a model's weights into another container.

    Args:
        name: a name or a model folder.
        out: for "upstream" a file, `.pt` or `.pth`; for "ddray" a folder, local or s3.
        layout: the container of the family's published files, or a model folder, which every job
            takes by its path.
        checkpoint: file of the network, where the name brings none.
        tokenizer: file of the tokenizer, likewise.

    Returns:
        What was written.

    Raises:
        ConfigError: if the name has no weights here, or `out` is of another kind.
        CheckpointError: for files that do not fit.
        StorageError: if it cannot be written.
    """
    if layout == "upstream" and Path(out).suffix not in (".pt", ".pth"):
        raise ConfigError(f"out={out!r} must end in .pt or .pth, as published files do")
    model = _load(name, checkpoint, tokenizer, device="cpu")
    family = FAMILIES[model.config["family"]]
    container = "".join(f'["{key}"]' for key in family.container) or "bare state dict"
    if layout == "upstream":
        write_container(out, model.model.state_dict(), family.container)
    else:
        container = "model folder"
        state = {"model": model.model.state_dict(), "tokenizer": model.tokenizer.state_dict()}
        save_folder(out, model.config, **state)
    return {
        "out": out,
        "container": container,
        "family": model.config["family"],
        "fingerprint": model.fingerprint,
    }

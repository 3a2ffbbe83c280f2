"""Names, families and layouts: from a name, a folder or a dictionary to a model in memory.

Models are built on the meta device and take the loaded tensors over, so weights are in memory once.
Imports the architectures, ddray.checkpoint, ddray.generate and ddray.errors.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ddray.checkpoint import CONFIG_FILE, StateDict, load_folder, load_into, read_weights
from ddray.errors import CheckpointError, ConfigError
from ddray.generate import Student, Teacher
from ddray.model import Tokenizer
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.storage import open_storage

Source = str | Path | Mapping[str, Any]
"""Weights: a file, or a state dict in memory."""

BUNDLED = Path(__file__).parent / "bundled"
METRIC_FOLDER = BUNDLED / "digits-classifier"


@dataclass(frozen=True)
class Family:
    """The classes behind a family name.

    Attributes:
        kind: "teacher" or "student".
        config: dataclass of the network's sizes.
        network: module class.
        tokenizer_config: dataclass of the tokenizer's sizes.
        tokenizer: module class.
        tokenizer_statistics: names in the tokenizer's files that mean nothing at inference.
    """

    kind: str
    config: type
    network: type
    tokenizer_config: type
    tokenizer: type
    tokenizer_statistics: frozenset[str]


_LLAMAGEN_VQ = (LlamaGenVQConfig, LlamaGenVQ, frozenset({"quantize.codebook_used"}))

FAMILIES = {
    "llamagen": Family("teacher", LlamaGenConfig, LlamaGen, *_LLAMAGEN_VQ),
    "llamagen-dd": Family("student", LlamaGenStudentConfig, LlamaGenStudent, *_LLAMAGEN_VQ),
}

STUDENT_OF = {"llamagen": "llamagen-dd"}
"""Which family is distilled into which."""

BUNDLED_MODELS = {
    "digits-llamagen": "LlamaGen of 49 tokens on real digits, the teacher of the quickstart",
    "digits-llamagen-dd": "its student, distilled for one and two steps",
}

# What a config.json says beside the sizes.
_CARD_FIELDS = {
    "family",
    "tokenizer",
    "name",
    "default_cfg",
    "class_names",
    "schedule",
    "split",
    "step",
    "teacher",
    "teacher_fingerprint",
    "tokenizer_fingerprint",
    "ddray_version",
    "quality",
}


def _nearest(value: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(value, valid, 1)
    return f"did you mean {near[0]!r}? " if near else ""


def _sizes(config_class: type, values: Mapping[str, Any], what: str) -> Any:
    """Build a config dataclass from a dictionary; unknown and missing fields are refused."""
    known = {field.name: field for field in fields(config_class)}
    for name in values:
        if name not in known:
            hint = _nearest(name, list(known))
            raise ConfigError(
                f"{what} has an unknown field {name!r}; {hint}known are {', '.join(sorted(known))}"
            )
    missing = [n for n, field in known.items() if field.default is MISSING and n not in values]
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}")
    try:
        return config_class(**values)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from error


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'device={device!r} is unknown; give "auto", "cpu" or "cuda"') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but there is no CUDA device here")
    return chosen


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype!r} is not one of float32, bfloat16, float16")
    return chosen


def resolve(spec: str | Path | Mapping[str, Any]) -> str | Path | Mapping[str, Any]:
    """A bundled name as its folder; folders and dictionaries as they are.

    Raises:
        ConfigError: if a name is neither bundled nor a folder with a config.
    """
    if isinstance(spec, Mapping):
        return spec
    if str(spec) in BUNDLED_MODELS:
        return BUNDLED / str(spec)
    if open_storage(str(spec)).exists(CONFIG_FILE):
        return str(spec)
    hint = _nearest(str(spec), list(BUNDLED_MODELS))
    raise ConfigError(
        f"no model {str(spec)!r}: it is no folder with a {CONFIG_FILE}, and no bundled model; "
        f"{hint}bundled are {', '.join(BUNDLED_MODELS)}"
    )


def _build(
    kind: str,
    spec: str | Path | Mapping[str, Any],
    checkpoint: Source | None,
    tokenizer: Source | None,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
) -> tuple[Any, Tokenizer, dict[str, Any], str]:
    where = resolve(spec)
    model_state: StateDict | None = None
    tokenizer_state: StateDict | None = None
    if isinstance(where, Mapping):
        config, name = dict(where), f"the given {kind}"
    else:
        config, model_state, tokenizer_state = load_folder(where)
        # A plan and a student's config name their models: by a path that holds elsewhere too.
        bundled = str(spec) in BUNDLED_MODELS
        name = str(spec) if bundled else open_storage(str(where)).uri
    if checkpoint is not None:
        model_state = read_weights(checkpoint)
    if tokenizer is not None:
        tokenizer_state = read_weights(tokenizer)
    family = _family(kind, config, name)
    if model_state is None:
        raise ConfigError(f"{name} is a set of sizes without weights; give checkpoint=")
    chosen, precision = _device(device), _dtype(dtype)
    codec, sizes = _build_tokenizer(family, config, tokenizer_state, name)
    network_fields = {k: v for k, v in config.items() if k not in _CARD_FIELDS}
    _check_code_width(family, network_fields, sizes, name)
    with torch.device("meta"):
        network = family.network(_sizes(family.config, network_fields, f"the config of {name}"))
    if sizes is not None and sizes.codebook_size != network.config.vocab_size:
        raise ConfigError(
            f"{name}: vocab_size={network.config.vocab_size}, but the tokenizer has "
            f"{sizes.codebook_size} codes"
        )
    load_into(network, model_state, f"the checkpoint of {name}")
    network.to(chosen, precision)
    if codec is not None:
        # Images and the transport are float32 whatever the network runs in.
        codec.to(chosen)
    return network, Tokenizer(codec, family.tokenizer_statistics), config, name


def _family(kind: str, config: Mapping[str, Any], name: str) -> Family:
    family_name = config.get("family")
    valid = [n for n, family in FAMILIES.items() if family.kind == kind]
    if family_name in FAMILIES and family_name not in valid:
        raise ConfigError(f"{name} is of family {family_name!r}, which is no {kind}")
    if family_name not in valid:
        raise ConfigError(f"{name}: family={family_name!r} is unknown; choose {', '.join(valid)}")
    return FAMILIES[family_name]


def _build_tokenizer(
    family: Family, config: Mapping[str, Any], state: StateDict | None, name: str
) -> tuple[Any, Any]:
    """The tokenizer module and its sizes; None and None where the config says so."""
    values = config.get("tokenizer", {})
    if values is None:
        if state is not None:
            raise ConfigError(f'{name} has "tokenizer": None, so tokenizer= has no effect')
        return None, None
    what = f"the tokenizer of {name}"
    sizes = _sizes(family.tokenizer_config, values, what)
    if state is None:
        raise ConfigError(f'{what} has no weights; give tokenizer=, or "tokenizer": None')
    with torch.device("meta"):
        codec = family.tokenizer(sizes)
    load_into(codec, state, what, family.tokenizer_statistics)
    return codec, sizes


def _check_code_width(family: Family, values: dict[str, Any], sizes: Any, name: str) -> None:
    """For a teacher `codebook_dim` is a statement about its tokenizer, for a student a size."""
    width = values.get("codebook_dim")
    if sizes is not None and width not in (None, sizes.codebook_embed_dim):
        raise ConfigError(
            f"{name}: codebook_dim={width}, but the tokenizer's codes have "
            f"{sizes.codebook_embed_dim} numbers"
        )
    if family.kind == "teacher":
        values.pop("codebook_dim", None)


def load_teacher(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoint: Source | None = None,
    tokenizer: Source | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> Teacher:
    """Load a teacher.

    Args:
        spec: a bundled name, a model folder (path or URI), or sizes with their "family".
        checkpoint: weights of the network, where `spec` has none or others are wanted.
        tokenizer: weights of the tokenizer, likewise.
        device: "auto" = CUDA if there is one.
        dtype: of the network; None = float32.

    Returns:
        The teacher in eval mode.

    Raises:
        ConfigError: for an unknown name or field, or sizes that do not fit.
        CheckpointError: if weights are damaged or do not fit the sizes.
    """
    network, codec, config, name = _build("teacher", spec, checkpoint, tokenizer, device, dtype)
    return Teacher(network, codec, config, name)


def load_student(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoint: Source | None = None,
    tokenizer: Source | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> Student:
    """Load a student; arguments and errors as for `load_teacher`."""
    network, codec, config, name = _build("student", spec, checkpoint, tokenizer, device, dtype)
    return Student(network, codec, config, name)


def new_student(teacher: Teacher) -> tuple[Any, dict[str, Any]]:
    """A student of the teacher's sizes, initialised from it, in float32 on its device.

    Returns:
        The trainable network, and the sizes and tokenizer part of its future config.json.

    Raises:
        CheckpointError: if the teacher's family has no student.
    """
    family_name = STUDENT_OF.get(teacher.config["family"])
    if family_name is None:
        raise CheckpointError(f"no student is known for family {teacher.config['family']!r}")
    family = FAMILIES[family_name]
    width = teacher.codebook.shape[1]
    sizes = {k: v for k, v in teacher.config.items() if k not in _CARD_FIELDS}
    # Unit-norm codes have variance 1 / E; the factor gives them the variance of the noise.
    sizes |= {"codebook_dim": width, "input_scale": width**0.5}
    network = family.network(_sizes(family.config, sizes, "the student"))
    network.to(teacher.device)
    network.init_from_teacher(teacher.model, teacher.codebook)
    carried = ("default_cfg", "class_names")
    card = {k: teacher.config[k] for k in carried if k in teacher.config}
    return network, {
        "family": family_name,
        **sizes,
        "tokenizer": teacher.config["tokenizer"],
        **card,
    }

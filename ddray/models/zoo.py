"""Names, families and layouts: from a name, a folder or a dictionary to a model in memory.

Models are built on the meta device and take the loaded tensors over, so weights are in memory once.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ddray.errors import CheckpointError, ConfigError, one_line
from ddray.locations import BUNDLED
from ddray.method.masked_decoding import Masked
from ddray.method.model import Model, Tokenizer
from ddray.method.student import Student
from ddray.method.teacher import Teacher
from ddray.models.catalog import BUNDLED_MODELS, PUBLISHED
from ddray.models.families import (
    FAMILIES,
    STUDENT_OF,
    Family,
    empty_network,
    empty_tokenizer,
    family_of,
    nearest,
    sizes_of,
)
from ddray.models.masked import MaskedTransformer, masked_sizes
from ddray.models.var import VAR
from ddray.storage import open_storage
from ddray.storage.checkpoint import (
    CONFIG_FILE,
    StateDict,
    load_folder,
    load_into,
    read_config,
    read_weights,
)
from ddray.text.loading import load_text_encoder, own_encoder

M = TypeVar("M", bound=Model)

Source = str | Path | Mapping[str, Any]
"""Weights: a file, or a state dict in memory."""

METRIC_FOLDER = BUNDLED / "digits-classifier"
EMOJI_JUDGE = BUNDLED / "emoji-judge"
BUNDLED_JUDGES = {"digits": METRIC_FOLDER, "emoji": EMOJI_JUDGE}
"""Folders of the networks that judge what bundled models make, by their names."""
EMOJI_REFERENCE = EMOJI_JUDGE / "held-out.npz"

# Compute capability of the first GPUs that multiply bfloat16.
_BFLOAT16_FROM = (8, 0)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'device={device!r} is unknown; give "auto", "cpu" or "cuda"') from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f'device={device!r} is not supported; give "auto", "cpu" or "cuda"')
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r}, but there is no CUDA device of that number here "
            f"({torch.cuda.device_count()} in all){_said_by_driver()}"
        )
    if chosen.type == "cuda":
        # cuDNN makes a plan for every number of keys, 25 ms each; a decoder's grows with each
        # token. Where torch would prefer it depends on GPU and release, and so would the bits.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def _said_by_driver() -> str:
    """Why there is no GPU at all, such as a driver older than the CUDA that torch was built for."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f": {one_line(error)}"
    return ""


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    on_old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < _BFLOAT16_FROM
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and not on_old_gpu else torch.float32
    if dtype == "tf32":
        if device.type != "cuda" or on_old_gpu:
            raise ConfigError(
                "dtype=tf32 is of GPUs from compute capability 8.0 on; give float32 here"
            )
        # Of the process, as torch has it; what must be true float32 says so itself.
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if dtype in (None, "tf32"):
        return torch.float32
    if on_old_gpu and dtype in ("bfloat16", torch.bfloat16):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} does not multiply bfloat16; give dtype=float16, "
            "or float32"
        )
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype!r} is not one of auto, float32, tf32, bfloat16, float16")
    return chosen


def _decode_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    chosen = _dtype(dtype, device)
    if chosen == torch.float16:
        raise ConfigError("decode_dtype=float16 overflows in a decoder; give float32 or bfloat16")
    return chosen


def resolve(spec: str | Path | Mapping[str, Any]) -> str | Path | Mapping[str, Any]:
    """A bundled name as its folder, a published one as its sizes; the rest as it is.

    Raises:
        ConfigError: if a name is neither of them nor a folder with a config.
    """
    if isinstance(spec, Mapping):
        return spec
    if str(spec) in BUNDLED_MODELS:
        return BUNDLED / str(spec)
    if str(spec) in PUBLISHED:
        return PUBLISHED[str(spec)].config
    if not Path(spec).is_file() and open_storage(str(spec)).exists(CONFIG_FILE):
        return str(spec)
    known = [*BUNDLED_MODELS, *PUBLISHED]
    if Path(spec).is_file():
        raise ConfigError(
            f"{spec} is a file; a model is a name, or a folder with a {CONFIG_FILE}: make one by "
            "`ddray export --layout ddray --checkpoint FILE`"
        )
    raise ConfigError(
        f"no model {str(spec)!r}: it is no folder with a {CONFIG_FILE}, and no known name; "
        f"{nearest(str(spec), known)}`ddray models` lists the names"
    )


def _build(
    kind: str,
    spec: str | Path | Mapping[str, Any],
    checkpoint: Source | None,
    tokenizer: Source | None,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    decode_dtype: str | torch.dtype | None,
) -> tuple[Any, Tokenizer, dict[str, Any], str]:
    where = resolve(spec)
    model_state: StateDict | None = None
    tokenizer_state: StateDict | None = None
    if isinstance(where, Mapping):
        config = dict(where)
        name = f"the given {kind}" if isinstance(spec, Mapping) else str(spec)
    else:
        config, model_state, tokenizer_state = load_folder(where)
        # A plan and a student's config name their models: by a path that holds elsewhere too.
        bundled = str(spec) in BUNDLED_MODELS
        name = str(spec) if bundled else open_storage(str(where)).uri
    family = family_of(kind, config, name)
    if checkpoint is not None:
        model_state = read_weights(checkpoint)
    if tokenizer is not None:
        tokenizer_state = read_weights(tokenizer, tokenizer=True)
    if model_state is None:
        raise ConfigError(f"{name} is a set of sizes without weights; {_how_to_get(name)}")
    chosen = _device(device)
    precision, pixels = _dtype(dtype, chosen), _decode_dtype(decode_dtype, chosen)
    codec = _load_tokenizer(family, config, tokenizer_state, name)
    network = empty_network(config, name)
    load_into(network, model_state, f"the checkpoint of {name}")
    network.to(chosen, precision)
    if codec is not None:
        # Images and the transport are float32 whatever the network runs in.
        codec.to(chosen)
        if isinstance(network, VAR):
            network.use_quantizer(codec.quantize)
    return network, Tokenizer(codec, family.tokenizer_statistics, pixels), config, name


def _how_to_get(name: str) -> str:
    published = PUBLISHED.get(name)
    if published is None or published.checkpoint is None:
        return "give checkpoint="
    files = f"checkpoint={published.checkpoint.name!r}, tokenizer={published.tokenizer.name!r}"
    return f"give {files}; `ddray models show {name}` says where these files are"


def _load_tokenizer(
    family: Family, config: Mapping[str, Any], state: StateDict | None, name: str
) -> Any:
    """The tokenizer with its weights; None where the config says so."""
    codec = empty_tokenizer(config, name)
    if codec is None and state is not None:
        raise ConfigError(f'{name} has "tokenizer": None, so tokenizer= has no effect')
    if codec is None and family.network is VAR:
        raise ConfigError(
            f'{name}: a VAR reads sums of codes, so "tokenizer": None leaves it without input'
        )
    if codec is None:
        return None
    what = f"the tokenizer of {name}"
    if state is None:
        raise ConfigError(f'{what} has no weights; give tokenizer=, or "tokenizer": None')
    load_into(codec, state, what, family.tokenizer_statistics)
    return codec


def image_side(config: Mapping[str, Any], name: str = "the given model") -> int:
    """Width and height of a model's images, in pixels, from its config alone.

    Raises:
        ConfigError: if the sizes do not fit together, or there is no tokenizer.
    """
    codec = empty_tokenizer(config, name)
    if codec is None:
        raise ConfigError(f'{name} has "tokenizer": None, so it makes no images')
    stages = empty_network(config, name).stages
    last = stages[-1] if max(stages) > 1 else len(stages)
    return math.isqrt(last) * codec.config.patch


def _reading(model: M) -> M:
    """The model; one of captions with the way to the text encoder that it was trained with."""
    if model.conditioning == "text":
        length = model.model.config.cls_token_num
        source = own_encoder(model.config)
        model.open_encoder = partial(load_text_encoder, source, length=length, device=model.device)
    return model


def load_teacher(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoint: Source | None = None,
    tokenizer: Source | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    decode_dtype: str | torch.dtype | None = None,
) -> Teacher:
    """Load a teacher.

    Args:
        spec: a name of `ddray models`, a model folder (path or URI), or sizes with their "family".
        checkpoint: weights of the network, where `spec` has none or others are wanted.
        tokenizer: weights of the tokenizer, likewise.
        device: "auto" = CUDA if there is one.
        dtype: of the network; None = float32, "auto" = bfloat16 on a GPU that multiplies it, else
            float32; "tf32" = float32 whose products are rounded to TF32, on a GPU alone.
        decode_dtype: of the tokenizer's decoder, likewise, but not float16.

    Returns:
        The teacher in eval mode.

    Raises:
        ConfigError: for an unknown name or field, or sizes that do not fit.
        CheckpointError: if weights are damaged or do not fit the sizes.
    """
    network, codec, config, name = _build(
        "teacher", spec, checkpoint, tokenizer, device, dtype, decode_dtype
    )
    return _reading(Teacher(network, codec, config, name))


def load_student(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoint: Source | None = None,
    tokenizer: Source | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    decode_dtype: str | torch.dtype | None = None,
) -> Student:
    """Load a student; arguments and errors as for `load_teacher`."""
    network, codec, config, name = _build(
        "student", spec, checkpoint, tokenizer, device, dtype, decode_dtype
    )
    return _reading(Student(network, codec, config, name))


def load_masked(
    spec: str | Path | Mapping[str, Any],
    *,
    checkpoint: Source | None = None,
    tokenizer: Source | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    decode_dtype: str | torch.dtype | None = None,
) -> Masked:
    """Load a model of masked decoding; arguments and errors as for `load_teacher`."""
    network, codec, config, name = _build(
        "masked model", spec, checkpoint, tokenizer, device, dtype, decode_dtype
    )
    return _reading(Masked(network, codec, config, name))


def new_student(teacher: Teacher, text_encoder: str = "") -> tuple[Any, dict[str, Any]]:
    """A student of the teacher's sizes, initialised from it, in float32 on its device.

    Args:
        teacher: whose student it is to be.
        text_encoder: that made the features it will learn from; empty = the teacher's own.

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
    sizes = {**asdict(teacher.model.config), "codebook_dim": width}
    network = family.network(sizes_of(family.config, sizes, "the student"))
    network.to(teacher.device)
    network.init_from_teacher(teacher.model, teacher.codebook)
    told = ("default_cfg", "default_top_p", "class_names", "example_captions", "images")
    card = _card(teacher, text_encoder, *told)
    return network, {
        "family": family_name,
        **sizes,
        "tokenizer": teacher.config["tokenizer"],
        **card,
    }


def _card(teacher: Teacher, text_encoder: str, *fields: str) -> dict[str, Any]:
    """What of a teacher's config is said of its students too, and the encoder of their captions.

    Features of another encoder mean nothing to a student, whatever its teacher was trained with.
    """
    told = {**teacher.config, **({"text_encoder": text_encoder} if text_encoder else {})}
    return {field: told[field] for field in (*fields, "text_encoder") if field in told}


def continue_student(
    spec: str | Path, teacher: Teacher, text_encoder: str = ""
) -> tuple[Any, dict[str, Any]]:
    """A student to train further, in float32 on the teacher's device.

    Args:
        spec: bundled name or student folder.
        teacher: whose student it has to be.
        text_encoder: as `new_student`; empty = the one that the student names.

    Returns:
        As `new_student`.

    Raises:
        ConfigError: if it is the student of another teacher, tokenizer or of other sizes.
        CheckpointError: if its weights are damaged.
    """
    student = load_student(spec, device=teacher.device)
    known = str(student.config.get("text_encoder") or "")
    network, card = new_student(teacher, text_encoder or known)
    stated = student.config.get("teacher_fingerprint", teacher.fingerprint)
    if stated != teacher.fingerprint:
        theirs = student.config.get("teacher", "another teacher")
        raise ConfigError(f"init={spec} was distilled from {theirs}, not from {teacher.name}")
    if student.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise ConfigError(f"init={spec} and {teacher.name} have different tokenizers")
    if student.model.config != network.config:
        mine, theirs = asdict(network.config), asdict(student.model.config)
        differing = [
            f"{k}={theirs.get(k)} (not {v})" for k, v in mine.items() if theirs.get(k) != v
        ]
        raise ConfigError(
            f"init={spec} is no student of {teacher.name}'s sizes: {', '.join(differing)}"
        )
    network.load_state_dict(student.model.state_dict())
    return network, card


def new_masked(
    teacher: Teacher, text_encoder: str = ""
) -> tuple[MaskedTransformer, dict[str, Any]]:
    """A model of masked decoding for a teacher's tokens, about as large, with random weights.

    Args:
        teacher: whose tokens.
        text_encoder: as `new_student`.

    Returns:
        As `new_student`.
    """
    sizes = masked_sizes(teacher.model.config)
    network = MaskedTransformer(sizes)
    network.init_weights()
    network.to(teacher.device)
    if network.conditioning == "text":
        null_TD: torch.Tensor = network.cls_embedding.uncond_embedding  # type: ignore[assignment]
        null_TD.copy_(teacher.model.cls_embedding.uncond_embedding)
    card = _card(teacher, text_encoder, "class_names", "images")
    return network, {
        "family": "masked",
        **asdict(sizes),
        "tokenizer": teacher.config["tokenizer"],
        **card,
    }


def empty_masked(teacher: str | Path | Mapping[str, Any]) -> MaskedTransformer:
    """A model of masked decoding for a teacher's tokens, on the meta device; as `empty_student`."""
    where = resolve(teacher)
    config = where if isinstance(where, Mapping) else read_config(where)
    sizes = masked_sizes(empty_network(config, str(teacher)).config)
    with torch.device("meta"):
        return MaskedTransformer(sizes)


def empty_student(teacher: str | Path | Mapping[str, Any]) -> Any:
    """A student of a teacher's sizes on the meta device; the teacher's weights are not needed.

    Args:
        teacher: name, model folder, or sizes.

    Raises:
        ConfigError: for an unknown teacher, or one whose family has no student.
    """
    where = resolve(teacher)
    config = where if isinstance(where, Mapping) else read_config(where)
    family = STUDENT_OF.get(str(config.get("family")))
    if family is None:
        raise ConfigError(
            f"no student is known for family {config.get('family')!r}; a teacher is one of "
            f"{', '.join(STUDENT_OF)}"
        )
    return empty_network({**config, "family": family}, f"the student of {teacher}")

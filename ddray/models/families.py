"""Families: what a config's sizes mean, and networks of these sizes, without weights."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ddray.errors import ConfigError, DDRayError, one_line
from ddray.models.llamagen import LlamaGen, LlamaGenConfig
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from ddray.models.masked import MaskedConfig, MaskedTransformer
from ddray.models.var import VAR
from ddray.models.var_blocks import VARConfig
from ddray.models.var_dd import VARStudent, VARStudentConfig
from ddray.models.var_vq import VARVQ, VARVQConfig


@dataclass(frozen=True)
class Family:
    """The classes behind a family name.

    Attributes:
        kind: "teacher", "student" or "masked model".
        config: dataclass of the network's sizes.
        network: module class.
        tokenizer_config: dataclass of the tokenizer's sizes.
        tokenizer: module class.
        tokenizer_statistics: names in the tokenizer's files that mean nothing at inference.
        container: keys under which published files of the family hold the weights.
    """

    kind: str
    config: type
    network: type
    tokenizer_config: type
    tokenizer: type
    tokenizer_statistics: frozenset[str]
    container: tuple[str, ...]


_LLAMAGEN_VQ = (LlamaGenVQConfig, LlamaGenVQ, frozenset({"quantize.codebook_used"}))


_VAR_VQ = (VARVQConfig, VARVQ, frozenset({"quantize.ema_vocab_hit_SV"}))


FAMILIES = {
    "llamagen": Family("teacher", LlamaGenConfig, LlamaGen, *_LLAMAGEN_VQ, ("model",)),
    "llamagen-dd": Family(
        "student", LlamaGenStudentConfig, LlamaGenStudent, *_LLAMAGEN_VQ, ("ema",)
    ),
    "var": Family("teacher", VARConfig, VAR, *_VAR_VQ, ()),
    "var-dd": Family(
        "student", VARStudentConfig, VARStudent, *_VAR_VQ, ("trainer", "ema_parameters")
    ),
    "masked": Family("masked model", MaskedConfig, MaskedTransformer, *_LLAMAGEN_VQ, ()),
}


_MASKED_SCALES = Family("masked model", MaskedConfig, MaskedTransformer, *_VAR_VQ, ())


STUDENT_OF = {"llamagen": "llamagen-dd", "var": "var-dd"}
"""Which family is distilled into which."""


# What a config.json says beside the sizes.
_CARD_FIELDS = {
    "family",
    "tokenizer",
    "name",
    "default_cfg",
    "default_top_p",
    "class_names",
    "example_captions",
    "text_encoder",
    "images",
    "schedule",
    "split",
    "code_precision",
    "step",
    "teacher",
    "teacher_fingerprint",
    "tokenizer_fingerprint",
    "ddray_version",
    "quality",
}


def family_of(kind: str, config: Mapping[str, Any], name: str) -> Family:
    """The family that a config names.

    Args:
        kind: "teacher", "student" or "masked model", or "model" for any.
        config: of the model.
        name: of the model, for messages.

    Raises:
        ConfigError: if there is no such family, or it is of another kind.
    """
    family_name = config.get("family")
    valid = [n for n, family in FAMILIES.items() if kind in ("model", family.kind)]
    if not isinstance(family_name, str):
        raise ConfigError(f"{name}: family={family_name!r} is unknown; choose {', '.join(valid)}")
    if family_name in FAMILIES and family_name not in valid:
        raise ConfigError(f"{name} is of family {family_name!r}, which is no {kind}")
    if family_name not in valid:
        raise ConfigError(f"{name}: family={family_name!r} is unknown; choose {', '.join(valid)}")
    # Its sizes say whose tokens it fills in: scales are VAR's.
    scales = family_name == "masked" and config.get("patch_nums") is not None
    return _MASKED_SCALES if scales else FAMILIES[family_name]


def _any_family(config: Mapping[str, Any], name: str) -> Family:
    """The family of a model of any kind."""
    return family_of("model", config, name)


def empty_network(config: Mapping[str, Any], name: str = "the given model") -> Any:
    """A network of the sizes of a config, on the meta device: names and shapes without memory.

    Raises:
        ConfigError: if the sizes do not fit together, or contradict the tokenizer's.
    """
    family = _any_family(config, name)
    with _on_meta(name):
        sizes = _network_sizes(family, config, _tokenizer_sizes(family, config, name), name)
        return family.network(sizes)


def empty_tokenizer(config: Mapping[str, Any], name: str = "the given model") -> Any:
    """The tokenizer of a config, on the meta device; None where the config says so.

    Raises:
        ConfigError: if the sizes do not fit together.
    """
    family = _any_family(config, name)
    with _on_meta(f"the tokenizer of {name}"):
        sizes = _tokenizer_sizes(family, config, name)
        return None if sizes is None else family.tokenizer(sizes)


def _tokenizer_sizes(family: Family, config: Mapping[str, Any], name: str) -> Any:
    values = config.get("tokenizer", {})
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: tokenizer={values!r} must hold the tokenizer's sizes, or None")
    if family.tokenizer is VARVQ and "patch_nums" in config:
        values = {"patch_nums": config["patch_nums"], **values}
    return sizes_of(family.tokenizer_config, values, f"the tokenizer of {name}")


def _network_sizes(family: Family, config: Mapping[str, Any], codec: Any, name: str) -> Any:
    """The network's sizes, refused where they contradict its tokenizer's."""
    values = {k: v for k, v in config.items() if k not in _CARD_FIELDS}
    stated = {"codebook_dim": values.get("codebook_dim")}
    if family.network in (LlamaGen, MaskedTransformer):
        # For these it is a statement about the tokenizer: they read ids, not codes.
        values.pop("codebook_dim", None)
    elif codec is not None:
        values.setdefault("codebook_dim", codec.code_width)
    if family.tokenizer is VARVQ and codec is not None:
        values.setdefault("vocab_size", codec.num_codes)
        values.setdefault("patch_nums", codec.patch_nums)
    sizes = sizes_of(family.config, values, f"the config of {name}")
    if codec is None:
        return sizes
    stated |= {"vocab_size": sizes.vocab_size, "patch_nums": getattr(sizes, "patch_nums", None)}
    actual = {
        "codebook_dim": codec.code_width,
        "vocab_size": codec.num_codes,
        "patch_nums": getattr(codec, "patch_nums", None),
    }
    for field, value in stated.items():
        if value is not None and value != actual[field]:
            raise ConfigError(
                f"{name}: {field}={value}, but its tokenizer has {field}={actual[field]}"
            )
    return sizes


def sizes_of(config_class: type, values: Mapping[str, Any], what: str) -> Any:
    """Build a config dataclass from a dictionary; unknown and missing fields are refused."""
    known = {field.name: field for field in fields(config_class)}
    for name in values:
        if name not in known:
            hint = nearest(name, list(known))
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


def nearest(value: str, valid: list[str]) -> str:
    """A question for the name that was perhaps meant, or nothing."""
    near = difflib.get_close_matches(value, valid, 1)
    return f"did you mean {near[0]!r}? " if near else ""


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
def _on_meta(what: str) -> Iterator[None]:
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

"""From presets, files, `--set` and flags to a checked configuration.

A preset is overlaid by a YAML file, and that by `--set key.path=value` and the verb's flags.
Unknown keys are refused with the nearest known one.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ddray.config.base import Job
from ddray.errors import ConfigError, one_line
from ddray.file_kind import explained
from ddray.locations import local_file

JobT = TypeVar("JobT", bound=Job)


def load_config(
    kind: type[JobT],
    *,
    preset: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> JobT:
    """Merge preset < file < `--set` < flags and check the result.

    Args:
        kind: the verb's config class.
        preset: values of a named preset.
        file: YAML file.
        settings: "key.path=value" strings; values are read as YAML.
        flags: values of the verb's own flags.

    Returns:
        The resolved config.

    Raises:
        ConfigError: one line that names the key, the value and what is allowed.
    """
    merged: dict[str, Any] = {}
    for values in (
        preset or {},
        {} if file is None else _read_yaml(file),
        *map(_read_setting, settings),
        flags or {},
    ):
        _refuse_moved(kind, values)
        overlay(merged, values)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, kind)) from None


def in_todays_keys(kind: type[Job], values: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier ddray wrote of a config, under the names that its keys have now.

    Keys that there were not at the time have their defaults. Others, such as those of a run's
    identity that are no config, stay.
    """
    today = kind().model_dump(mode="json")
    for key, value in values.items():
        part = kind.model_fields[key].default if key in kind.model_fields else None
        if isinstance(part, Job) and isinstance(value, Mapping):
            today[key] = in_todays_keys(type(part), value)
        elif key in kind.MOVED:
            outer, _, inner = kind.MOVED[key].partition(".")
            overlay(today, {outer: {inner: value}})
        else:
            overlay(today, {key: value})
    return today


# A date that is none is a ValueError of its own.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError, OverflowError)


class _Yaml(yaml.SafeLoader):
    """YAML without base-60 numbers: in YAML 1.1, 1:2 would be the integer 62."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), [*"-+0123456789"])
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"),
    [*"-+.0123456789"],
)


def overlay(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put values over those of a nested dictionary, key by key, in place."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            overlay(target[key], value)
        elif isinstance(value, Mapping):
            target[key] = {}
            overlay(target[key], value)
        else:
            target[key] = value


def _read_yaml(file: str | Path) -> dict[str, Any]:
    """The keys and values of a file in UTF-8, or in UTF-16 with its mark."""
    try:
        data = Path(local_file(file)).read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:  # no name of a file
        raise ConfigError(f"--config {str(file)!r}: {one_line(error)}") from error
    try:
        values = yaml.load(data, _Yaml)
    except _NO_YAML as error:
        refusal = f"--config {file} is not YAML"
        raise ConfigError(explained(refusal, data, _said(error), "text (")) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        refusal = f"--config {file} must hold keys and values, not {type(values).__name__}"
        raise ConfigError(explained(refusal, data, "", "text (")) from None
    if _is_endless(values):
        raise ConfigError(f"--config {file} holds itself, by an alias")
    return values


def _said(error: BaseException) -> str:
    """What YAML's reader says, with what mends the commonest mistake."""
    said = one_line(error)
    tab = "found character '\\t'" in said
    return f"{said}; indent by spaces, not by tabs" if tab else said


def _is_endless(values: Mapping[str, Any]) -> bool:
    """Whether a value holds itself; nothing could be made of such a file."""
    try:
        json.dumps(values, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        return True
    return False


def _read_setting(setting: str) -> dict[str, Any]:
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting!r} is not of the form key.path=value")
    try:
        value: Any = yaml.load(text, _Yaml)
    except _NO_YAML:
        value = text
    if isinstance(value, Mapping) and _is_endless(value):
        raise ConfigError(f"--set {setting!r} holds itself, by an alias")
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _first_problem(error: ValidationError, kind: type[Job]) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "model_type":
        inside = ", ".join(f"{where}.{key}" for key in _known_keys(kind, location))
        return f"{where}={problem['input']!r}: {where!r} is no key but holds some: {inside}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        # It names the value itself, unless that holds a secret.
        return f"{where}: {cause}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and not where:
        return message
    return f"{where}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _refuse_moved(kind: type[Job], values: Mapping[str, Any], outer: str = "") -> None:
    """Refuse keys that are called otherwise now, before another source can hide them."""
    for key, value in values.items():
        part = kind.model_fields[key].default if key in kind.model_fields else None
        if isinstance(value, Mapping):
            if isinstance(part, Job):
                _refuse_moved(type(part), value, f"{outer}{key}.")
        elif key in kind.MOVED:
            now = f"{outer}{kind.MOVED[key]}"
            raise ConfigError(f"{outer}{key}={value!r}: {outer + key!r} is {now!r} now")


def _known_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        inner = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return sorted(kind.model_fields)

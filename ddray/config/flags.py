"""A configuration as flags of the command line: one a key, under the headings of its help."""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ddray.config.base import Job
from ddray.errors import ConfigError

_DEST = "key:"
# How shtab is told that a value is the name of a file.
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


def add_flags(parser: argparse.ArgumentParser, kind: type[Job]) -> None:
    """Give a parser the flags of a config, a nested key as `--outer.inner`.

    Args:
        parser: of the verb.
        kind: the verb's config class.
    """
    if kind.POSITIONAL:
        # Where it is absent, it must not hide what the flag said.
        parser.add_argument(
            _DEST + kind.POSITIONAL, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    for heading, keys in _sections(kind).items():
        group = parser.add_argument_group(heading)
        for key in keys:
            for path, field in _leaves(key, kind.model_fields[key]):
                _add_flag(group, path, field)


def show_to_shells(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the words that its flags take, which checks of values need not know."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                show_to_shells(inner)
        elif isinstance(action.metavar, str) and action.metavar.startswith("{"):
            action.choices = action.metavar.strip("{}").split(",")
        elif action.dest in ("config", "compare"):
            action.complete = _FILES  # type: ignore[attr-defined]
    return parser


def command_of(verb: str, config: Job) -> str:
    """The command line that a config comes from: the verb, and each key that is not its default."""
    words = ["ddray", verb]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value == field.get_default():
            continue
        if isinstance(value, bool):
            words.append(_flag(name) if value else f"--no-{name.replace('_', '-')}")
        else:
            words += [_flag(name), _given(name, value)]
    return shlex.join(words)


def _given(name: str, value: Any) -> str:
    """A value as its flag takes it."""
    if name == "workers":
        return ":".join(map(str, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_given(key, inner)}" for key, inner in value.items())
    if value == ():
        return "off"
    if isinstance(value, tuple):
        # Schedules hold commas themselves.
        return ("/" if name in ("schedule", "schedules") else ",").join(map(str, value))
    return str(value)


def refuse_moved_flags(kind: type[Job], argv: Sequence[str]) -> None:
    """Refuse flags of keys that have got another name.

    Raises:
        ConfigError: with the flag that it is now.
    """
    moved = {_flag(old): _flag(new) for old, new in kind.MOVED.items()}
    for argument in argv:
        name = argument.partition("=")[0]
        if name in moved:
            raise ConfigError(f"{name} is {moved[name]} now")


def given_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_flags` were given, nested as the config is."""
    values: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        if name.startswith(_DEST) and value is not None:
            *outer, key = name.removeprefix(_DEST).split(".")
            place = values
            for part in outer:
                place = place.setdefault(part, {})
            place[key] = value
    return values


def _sections(kind: type[Job]) -> dict[str, list[str]]:
    """Keys by heading, in the order of `HEADINGS`."""
    first = {key: heading for heading, key in kind.HEADINGS.items()}
    sections: dict[str, list[str]] = {heading: [] for heading in kind.HEADINGS}
    heading = ""
    for key in kind.model_fields:
        heading = first.get(key, heading)
        sections[heading].append(key)
    return sections


def _leaves(path: str, field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    """The key itself, or those of the config that it holds."""
    if not isinstance(field.default, Job):
        yield path, field
        return
    # A part that is a verb's own config has its own help.
    if field.default.EXAMPLE:
        return
    for name, inner in type(field.default).model_fields.items():
        yield from _leaves(f"{path}.{name}", inner)


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _add_flag(group: Any, path: str, field: FieldInfo) -> None:
    shown = _shown(path, field.default)
    suffix = f" (default: {shown})" if shown else ""
    # Percent signs mean something to argparse.
    text = f"{field.description or ''}{suffix}".strip().replace("%", "%%")
    if isinstance(field.default, bool) or field.annotation == bool | None:
        switch = argparse.BooleanOptionalAction
        group.add_argument(_flag(path), action=switch, dest=_DEST + path, help=text)
        return
    options: dict[str, Any] = {"metavar": _values(field), "dest": _DEST + path}
    if {"off", "auto"} <= {*choices_of(field)}:
        # A switch that may say more: the flag alone is auto.
        options |= {"nargs": "?", "const": "auto"}
        off = {"action": "store_const", "const": "off", "dest": _DEST + path}
        group.add_argument(f"--no-{_flag(path)[2:]}", help=argparse.SUPPRESS, **off)
    group.add_argument(_flag(path), help=text, **options)


def _values(field: FieldInfo) -> str:
    """What stands for the value of a flag: the choices, where there are some."""
    choices = choices_of(field)
    return f"{{{','.join(choices)}}}" if choices else "X"


def choices_of(field: FieldInfo) -> list[str]:
    """The words that a key takes; none where it takes anything else."""
    kinds = (field.annotation, *get_args(field.annotation))
    if int in kinds:  # or a number
        return []
    found = (get_args(kind) for kind in kinds if get_origin(kind) is Literal)
    return [str(choice) for choice in next(found, ())]


def _shown(path: str, default: Any) -> str:
    """A default as it would be given."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if path in ("workers", "replicas"):
        fewest, most = default
        return str(most) if fewest == most else f"{fewest}:{most}"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is None else str(default)


def description_of(kind: type[Job]) -> str:
    """What the help of a verb says before its flags."""
    parts = [name for name, field in kind.model_fields.items() if _is_part(field)]
    text = f"{kind.__doc__}\n\nexample:\n  {kind.EXAMPLE}"
    if parts:
        text += (
            f"\n\nIts parts, {', '.join(parts)}, have the keys of the verbs of these names,\n"
            "to be given as --set PART.KEY=VALUE."
        )
    return text


def _is_part(field: FieldInfo) -> bool:
    return isinstance(field.default, Job) and bool(field.default.EXAMPLE)
